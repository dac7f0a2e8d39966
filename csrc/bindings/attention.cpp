#include "llmcore/attention.h"

#include <algorithm>
#include <cmath>

#include "common.h"

namespace llmcore {
namespace {

// Where the call's sequences, heads and masks are described: what all three ops check alike.
struct Call {
  AttentionShape shape{};
  AttentionMask mask{};
  std::vector<Tensor> keep;  // contiguous copies that the pointers above point into
  int64_t total_q = 0, total_k = 0;
};

RowStrides strides(const Tensor& t) {  // (batch, seq, heads, dim) or packed (total, heads, dim)
  return t.dim() == 4 ? RowStrides{t.stride(0), t.stride(1), t.stride(2)} : RowStrides{0, t.stride(0), t.stride(1)};
}

const int32_t* cu_seqlens(Call& call, const Tensor& cu, const Tensor& q, int64_t total, const char* what,
                          const char* of) {
  call.keep.push_back(checked_offsets(cu, q, total, what, of));
  return static_cast<const int32_t*>(call.keep.back().const_data_ptr());
}

void set_mask(Call& call, const Tensor& q, const OptTensor& sinks, const OptTensor& position_bias, bool causal,
              int64_t window, double scale, double softcap, const std::string& op) {
  AttentionMask& m = call.mask;
  m.scale = static_cast<float>(scale);
  m.softcap = static_cast<float>(softcap);
  m.causal = causal;
  m.window = std::min<int64_t>(window, INT64_MAX / 2);  // so that position + window does not overflow
  LLMCORE_CHECK(std::isfinite(m.scale), op, ": scale is ", scale, "; it must be finite in float32");
  check_softcap(softcap, op);
  LLMCORE_CHECK(window >= 0, op, ": window is ", window, "; it must be positive, or 0 for none");
  if (sinks) {
    const std::string what = op + ": sinks";
    check_device(*sinks, q, what.c_str());
    check_dtype(*sinks, ScalarType::Float, what.c_str());
    check_shape(*sinks, {q.size(-2)}, what.c_str());
    call.keep.push_back(dense(*sinks));
    m.sinks = static_cast<const float*>(call.keep.back().const_data_ptr());
  }
  if (position_bias) {
    const std::string what = op + ": position_bias";
    check_device(*position_bias, q, what.c_str());
    check_dtype(*position_bias, ScalarType::Float, what.c_str());
    LLMCORE_CHECK(position_bias->dim() == 2 && position_bias->size(0) == q.size(-2) && position_bias->size(1) % 2 == 1,
                  what, " has shape ", shape_text(*position_bias), "; expected (", q.size(-2),
                  " heads, an odd number of distances)");
    LLMCORE_CHECK(q.is_cpu() && softcap == 0, what, " is served on the CPU, without a softcap");
    call.keep.push_back(dense(*position_bias));
    m.position_bias = static_cast<const float*>(call.keep.back().const_data_ptr());
    m.bias_reach = position_bias->size(1) / 2;
  }
}

void set_heads(AttentionShape& s, const Tensor& q, const Tensor& k, const Tensor& v, const std::string& op) {
  s.heads = q.size(-2);
  s.head_dim = q.size(-1);
  s.kv_heads = k.size(-2);
  s.v_head_dim = v.size(-1);
  LLMCORE_CHECK(s.kv_heads >= 1 && s.heads % s.kv_heads == 0 && s.heads >= 1, op, ": q has ", s.heads,
                " heads and k has ", s.kv_heads, "; the heads of q must be a multiple of those of k");
  LLMCORE_CHECK(v.size(-2) == s.kv_heads, op, ": v has ", v.size(-2), " heads, but k has ", s.kv_heads);
  LLMCORE_CHECK(k.size(-1) == s.head_dim, op, ": k has head size ", k.size(-1), ", but q has ", s.head_dim);
  LLMCORE_CHECK(s.head_dim >= 1 && s.v_head_dim >= 1, op, ": head sizes are ", s.head_dim, " (q, k) and ", s.v_head_dim,
                " (v); they must be at least 1");
}

Call describe(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& sinks, const OptTensor& position_bias,
              const OptTensor& block_mask, const OptTensor& cu_q, const OptTensor& cu_k, bool causal, int64_t window,
              double scale, double softcap, int64_t block_q, int64_t block_k, const std::string& op) {
  Call call;
  AttentionShape& s = call.shape;
  const bool packed = cu_q.has_value();
  const char* layout = packed ? "(total, heads, head_dim) with cu_seqlens" : "(batch, seq, heads, head_dim)";
  LLMCORE_CHECK(packed || !cu_k, op, ": cu_seqlens_k is given without cu_seqlens_q");
  float_dtype(q, (op + ": q").c_str());
  const std::pair<const Tensor*, const char*> tensors[] = {{&q, ": q"}, {&k, ": k"}, {&v, ": v"}};
  for (const auto& [t, name] : tensors) {
    check_device(*t, q, (op + name).c_str());
    check_dim(*t, packed ? 3 : 4, (op + name).c_str(), layout);
    check_same_dtype(*t, q, (op + name).c_str(), "q");
  }
  set_heads(s, q, k, v, op);
  const int64_t k_rows = k.size(-3), v_rows = v.size(-3);
  LLMCORE_CHECK(k_rows == v_rows, op, ": k has ", k_rows, " keys, but v has ", v_rows);
  call.total_q = q.size(-3);
  call.total_k = k_rows;
  int64_t longest_q = q.size(-3), longest_k = k_rows;
  if (packed) {
    s.cu_q = cu_seqlens(call, *cu_q, q, call.total_q, (op + ": cu_seqlens_q").c_str(), "q");
    s.cu_k = cu_seqlens(call, cu_k ? *cu_k : *cu_q, q, call.total_k, (op + ": cu_seqlens_k").c_str(), "k");
    s.batch = cu_q->size(0) - 1;
    LLMCORE_CHECK(!cu_k || cu_k->size(0) == cu_q->size(0), op, ": cu_seqlens_k describes ", cu_k->size(0) - 1,
                  " sequences, but cu_seqlens_q ", s.batch);
    s.total_q = call.total_q;
    s.total_k = call.total_k;
    // On a CUDA device the lengths are not known here: a block mask must then cover as much as one could have.
    if (q.is_cpu()) longest_q = longest_k = 0;
    for (int64_t b = 0; q.is_cpu() && b < s.batch; ++b) {
      longest_q = std::max<int64_t>(longest_q, s.cu_q[b + 1] - s.cu_q[b]);
      longest_k = std::max<int64_t>(longest_k, s.cu_k[b + 1] - s.cu_k[b]);
    }
  } else {
    s.batch = q.size(0);
    s.seq_q = q.size(1);
    s.seq_k = k.size(1);
    s.total_q = s.batch * s.seq_q;
    s.total_k = s.batch * s.seq_k;
    LLMCORE_CHECK(k.size(0) == s.batch && v.size(0) == s.batch, op, ": q, k, v have batch sizes ", s.batch, ", ",
                  k.size(0), ", ", v.size(0), "; they must be equal");
  }
  set_mask(call, q, sinks, position_bias, causal, window, scale, softcap, op);
  if (block_mask) {
    const std::string what = op + ": block_mask";
    check_device(*block_mask, q, what.c_str());
    check_dtype(*block_mask, ScalarType::Bool, what.c_str());
    check_dim(*block_mask, 4, what.c_str(), "(batch or 1, heads or 1, query blocks, key blocks)");
    LLMCORE_CHECK(block_q >= 1 && block_k >= 1, op, ": block sizes are ", block_q, " and ", block_k, "; at least 1");
    const Tensor dense_mask = dense(*block_mask);
    const int64_t mb = dense_mask.size(0), mh = dense_mask.size(1), mq = dense_mask.size(2), mk = dense_mask.size(3);
    const auto cover = [](int64_t blocks, int64_t size, int64_t n) { return n == 0 || (n - 1) / size < blocks; };
    LLMCORE_CHECK((mb == 1 || mb == s.batch) && (mh == 1 || mh == s.heads) && cover(mq, block_q, longest_q) &&
                      cover(mk, block_k, longest_k),
                  what, " has shape ", shape_text(*block_mask), " with blocks of ", block_q, " x ", block_k,
                  "; it must cover batch ", s.batch, " (or 1), ", s.heads, " heads (or 1), ", longest_q,
                  " queries and ", longest_k, " keys");
    call.keep.push_back(dense_mask);
    AttentionMask& m = call.mask;
    m.block_mask = static_cast<const uint8_t*>(dense_mask.const_data_ptr());
    m.mask_batch = mb == 1 ? 0 : mh * mq * mk;
    m.mask_head = mh == 1 ? 0 : mq * mk;
    m.mask_row = mk;
    m.block_q = block_q;
    m.block_k = block_k;
  }
  return call;
}

Tensor new_rows(const Tensor& q, int64_t rows_dim, int64_t heads, int64_t dim) {
  return q.dim() == 4 ? empty(q, {q.size(0), rows_dim, heads, dim}) : empty(q, {rows_dim, heads, dim});
}

std::tuple<Tensor, Tensor> attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptTensor& sinks,
                                     const OptTensor& position_bias, const OptTensor& block_mask, const OptTensor& cu_q,
                                     const OptTensor& cu_k, bool causal, int64_t window, double scale, double softcap,
                                     int64_t block_q, int64_t block_k, bool /*deterministic: always*/) {
  const Call call = describe(q_in, k_in, v_in, sinks, position_bias, block_mask, cu_q, cu_k, causal, window, scale,
                             softcap, block_q, block_k, "attention");
  const AttentionShape& s = call.shape;
  const Tensor q = last_dim_contiguous(q_in), k = last_dim_contiguous(k_in), v = last_dim_contiguous(v_in);
  Tensor out = new_rows(q, call.total_q, s.heads, s.v_head_dim);
  Tensor lse = s.cu_q ? empty(q, {s.heads, call.total_q}, ScalarType::Float)
                      : empty(q, {s.batch, s.heads, s.seq_q}, ScalarType::Float);
  AttentionParams p{};
  p.shape = s;
  p.mask = call.mask;
  p.q_dtype = p.kv_dtype = float_dtype(q, "attention: q");
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.q_strides = strides(q);
  p.k_strides = strides(k);
  p.v_strides = strides(v);
  p.out = out.mutable_data_ptr();
  p.out_strides = strides(out);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.lse_batch = s.cu_q ? 0 : s.heads * s.seq_q;
  p.lse_head = s.cu_q ? call.total_q : s.seq_q;
  LLMCORE_RUN_WITH_WORKSPACE(attention_forward, q, p);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout_in, const OptTensor& dlse, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const Tensor& out_in, const Tensor& lse_in, const OptTensor& sinks, const OptTensor& position_bias,
    const OptTensor& block_mask, const OptTensor& cu_q, const OptTensor& cu_k, bool causal, int64_t window,
    double scale, double softcap, int64_t block_q, int64_t block_k, bool deterministic) {
  const Call call = describe(q_in, k_in, v_in, sinks, position_bias, block_mask, cu_q, cu_k, causal, window, scale,
                             softcap, block_q, block_k, "attention_backward");
  const AttentionShape& s = call.shape;
  const auto check_like_out = [&](const Tensor& t, const char* what) {
    check_device(t, q_in, what);
    check_same_dtype(t, q_in, what, "q");
    if (s.cu_q)
      check_shape(t, {call.total_q, s.heads, s.v_head_dim}, what);
    else
      check_shape(t, {s.batch, s.seq_q, s.heads, s.v_head_dim}, what);
  };
  const auto check_like_lse = [&](const Tensor& t, const char* what) {
    check_device(t, q_in, what);
    check_dtype(t, ScalarType::Float, what);
    if (s.cu_q)
      check_shape(t, {s.heads, call.total_q}, what);
    else
      check_shape(t, {s.batch, s.heads, s.seq_q}, what);
  };
  check_like_out(dout_in, "attention_backward: dout");
  check_like_out(out_in, "attention_backward: out");
  check_like_lse(lse_in, "attention_backward: lse");
  if (dlse) check_like_lse(*dlse, "attention_backward: dlse");
  const Tensor q = last_dim_contiguous(q_in), k = last_dim_contiguous(k_in), v = last_dim_contiguous(v_in),
               out = last_dim_contiguous(out_in), dout = last_dim_contiguous(dout_in), lse = dense(lse_in);
  const Tensor dlse_dense = dlse ? dense(*dlse) : lse;
  Tensor dq = empty_same_shape(q), dk = empty_same_shape(k), dv = empty_same_shape(v);
  Tensor dsinks = sinks ? zeros(q, {s.batch, s.heads}, ScalarType::Float) : empty(q, {0}, ScalarType::Float);
  Tensor dbias = position_bias ? zeros(q, {s.batch, s.heads, position_bias->size(1)}, ScalarType::Float)
                               : empty(q, {0}, ScalarType::Float);
  AttentionBackwardParams p{};
  p.shape = s;
  p.mask = call.mask;
  p.dtype = float_dtype(q, "attention_backward: q");
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.out = out.const_data_ptr();
  p.dout = dout.const_data_ptr();
  p.q_strides = strides(q);
  p.k_strides = strides(k);
  p.v_strides = strides(v);
  p.out_strides = strides(out);
  p.dout_strides = strides(dout);
  p.lse = static_cast<const float*>(lse.const_data_ptr());
  p.dlse = dlse ? static_cast<const float*>(dlse_dense.const_data_ptr()) : nullptr;
  p.lse_batch = s.cu_q ? 0 : s.heads * s.seq_q;
  p.lse_head = s.cu_q ? call.total_q : s.seq_q;
  p.dq = dq.mutable_data_ptr();
  p.dk = dk.mutable_data_ptr();
  p.dv = dv.mutable_data_ptr();
  p.dq_strides = strides(dq);
  p.dk_strides = strides(dk);
  p.dv_strides = strides(dv);
  p.deterministic = deterministic;
  p.dsinks = sinks ? static_cast<float*>(dsinks.mutable_data_ptr()) : nullptr;
  p.dbias = position_bias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr;
  LLMCORE_RUN_WITH_WORKSPACE(attention_backward, q, p);
  return {dq, dk, dv, sinks ? sum_partials(dsinks, ScalarType::Float) : dsinks,
          position_bias ? sum_partials(dbias, ScalarType::Float) : dbias};
}

Tensor paged_attention(const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                       const Tensor& kv_lens, const OptTensor& cu_q, const OptTensor& sinks,
                       const OptTensor& position_bias, const OptTensor& k_scale, const OptTensor& v_scale, bool causal,
                       int64_t window, double scale, double softcap) {
  const std::string op = "paged_attention";
  Call call;
  AttentionShape& s = call.shape;
  AttentionParams p{};
  check_dim(q_in, 3, "paged_attention: q", "(batch, heads, head_dim), or (total, heads, head_dim) with cu_seqlens_q");
  p.q_dtype = float_dtype(q_in, "paged_attention: q");
  p.kv_dtype = cache_dtype(k_cache, "paged_attention: k_cache");
  for (const auto& [cache, name] :
       {std::pair{&k_cache, "paged_attention: k_cache"}, {&v_cache, "paged_attention: v_cache"}}) {
    check_device(*cache, q_in, name);
    check_dim(*cache, 4, name, "(num_blocks, block_size, kv_heads, head_dim)");
    LLMCORE_CHECK(cache->size(-1) <= 1 || cache->stride(-1) == 1, name, " must be contiguous in its last dimension");
  }
  check_same_dtype(v_cache, k_cache, "paged_attention: v_cache", "k_cache");
  set_heads(s, q_in, k_cache, v_cache, op);
  const int64_t num_blocks = k_cache.size(0);
  s.block_size = k_cache.size(1);
  LLMCORE_CHECK(s.block_size >= 1, op, ": k_cache has shape ", shape_text(k_cache), "; a block holds at least 1 token");
  LLMCORE_CHECK(v_cache.size(0) == num_blocks && v_cache.size(1) == s.block_size, op, ": v_cache has shape ",
                shape_text(v_cache), ", but k_cache has ", shape_text(k_cache), "; blocks must agree");
  check_device(block_table, q_in, "paged_attention: block_table");
  check_dtype(block_table, ScalarType::Int, "paged_attention: block_table");
  check_dim(block_table, 2, "paged_attention: block_table", "(batch, max_blocks)");
  s.batch = block_table.size(0);
  s.total_q = q_in.size(0);
  check_device(kv_lens, q_in, "paged_attention: kv_lens");
  check_dtype(kv_lens, ScalarType::Int, "paged_attention: kv_lens");
  check_shape(kv_lens, {s.batch}, "paged_attention: kv_lens");
  const Tensor table = dense(block_table), lens = dense(kv_lens), q = last_dim_contiguous(q_in);
  s.block_table = static_cast<const int32_t*>(table.const_data_ptr());
  s.table_stride = table.size(1);
  s.kv_lens = static_cast<const int32_t*>(lens.const_data_ptr());
  for (int64_t b = 0; q.is_cpu() && b < s.batch; ++b) {  // on a CUDA device they are not looked at
    const int64_t len = s.kv_lens[b], capacity = s.table_stride * s.block_size;
    LLMCORE_CHECK(len >= 0 && len <= capacity, op, ": kv_lens[", b, "] is ", len, "; it must be between 0 and the ",
                  capacity, " tokens that ", s.table_stride, " blocks of ", s.block_size, " hold");
    for (int64_t j = 0; j * s.block_size < len; ++j) {
      const int64_t block = s.block_table[b * s.table_stride + j];
      LLMCORE_CHECK(block >= 0 && block < num_blocks, op, ": block_table[", b, "][", j, "] is ", block,
                    ", outside the cache of ", num_blocks, " blocks");
    }
  }
  if (cu_q) {
    s.cu_q = cu_seqlens(call, *cu_q, q, q.size(0), "paged_attention: cu_seqlens_q", "q");
    LLMCORE_CHECK(cu_q->size(0) == s.batch + 1, op, ": cu_seqlens_q describes ", cu_q->size(0) - 1,
                  " sequences, but block_table ", s.batch);
    p.q_strides = strides(q);
  } else {
    LLMCORE_CHECK(q.size(0) == s.batch, op, ": q has shape ", shape_text(q), ", but block_table has ", s.batch,
                  " sequences; without cu_seqlens_q there is one query for each");
    s.seq_q = 1;
    p.q_strides = {q.stride(0), 0, q.stride(1)};
  }
  LLMCORE_CHECK(has_scales(p.kv_dtype) == k_scale.has_value() && k_scale.has_value() == v_scale.has_value(), op,
                ": k_scale and v_scale go with int8 and float8_e4m3fn caches (and only with them); the caches are ",
                dtype_name(k_cache.scalar_type()));
  const auto scales = [&](const OptTensor& t, const char* what) -> const float* {
    if (!t) return nullptr;
    check_device(*t, q_in, what);
    check_dtype(*t, ScalarType::Float, what);
    check_shape(*t, {num_blocks, s.block_size, s.kv_heads}, what);
    LLMCORE_CHECK(t->is_contiguous(), what, " must be contiguous");
    return static_cast<const float*>(t->const_data_ptr());
  };
  p.k_scale = scales(k_scale, "paged_attention: k_scale");
  p.v_scale = scales(v_scale, "paged_attention: v_scale");
  set_mask(call, q, sinks, position_bias, causal, window, scale, softcap, op);
  Tensor out = empty(q, {q.size(0), s.heads, s.v_head_dim});
  p.shape = s;
  p.mask = call.mask;
  p.q = q.const_data_ptr();
  p.k = k_cache.const_data_ptr();
  p.v = v_cache.const_data_ptr();
  p.k_strides = {k_cache.stride(0), k_cache.stride(1), k_cache.stride(2)};
  p.v_strides = {v_cache.stride(0), v_cache.stride(1), v_cache.stride(2)};
  p.out = out.mutable_data_ptr();
  p.out_strides = cu_q ? RowStrides{0, out.stride(0), out.stride(1)} : RowStrides{out.stride(0), 0, out.stride(1)};
  LLMCORE_RUN_WITH_WORKSPACE(attention_forward, q, p);
  return out;
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
