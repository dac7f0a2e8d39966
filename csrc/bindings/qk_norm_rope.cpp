// The CPU's side of qk_norm_rope; on CUDA devices it is Python around other ops (llmcore/ops/qk_norm_rope_cuda.py).
#include "llmcore/qk_norm_rope.h"

#include "common.h"
#include "rope_and_cache.h"

namespace llmcore {
namespace {

// Everything but what is computed: the tensors keep alive what `heads` points to.
struct Checked {
  std::optional<RopeTables> tables;
  OptTensor q_weight, k_weight;
  QkHeads heads;
};

struct Options {  // as in the schema
  int64_t num_heads, num_kv_heads;
  const OptTensor &cos, &sin, &positions, &q_weight, &k_weight;
  double eps;
  bool interleaved;
};

OptTensor checked_weight(const std::string& what, const OptTensor& weight, const Tensor& x, const char* x_name,
                         int64_t head_dim) {
  if (!weight) return std::nullopt;
  check_like(*weight, x, {head_dim}, what.c_str(), x_name);
  return dense(*weight);
}

// `x` (qkv, or a gradient in the backward pass) has heads for tokens of shape (batch, seq) or, packed, (total).
Checked check(const std::string& op, const char* x_name, const Tensor& x, int64_t head_dim, const Options& o) {
  Checked c{std::nullopt,
            checked_weight(op + ": q_weight", o.q_weight, x, x_name, head_dim),
            checked_weight(op + ": k_weight", o.k_weight, x, x_name, head_dim),
            {}};
  LLMCORE_CHECK(o.eps >= 0, op, ": eps is ", o.eps, "; it must not be negative");
  LLMCORE_CHECK(o.cos.has_value() == o.sin.has_value(), op, ": ", o.cos ? "sin" : "cos", " is missing, but ",
                o.cos ? "cos" : "sin", " is given; they go together");
  const bool packed = x.dim() == (x_name == std::string("qkv") ? 2 : 3);
  const int64_t batch = packed ? 1 : x.size(0), seq = x.size(packed ? 0 : 1);
  if (o.cos && packed) c.tables = checked_tables(op, x_name, x, {seq}, head_dim, *o.cos, *o.sin, o.positions);
  if (o.cos && !packed) c.tables = checked_tables(op, x_name, x, {batch, seq}, head_dim, *o.cos, *o.sin, o.positions);
  c.heads = {float_dtype(x, (op + ": " + x_name).c_str()),
             batch * seq,
             seq,
             o.num_heads,
             o.num_kv_heads,
             head_dim,
             c.tables ? c.tables->rotary_dim() : 0,
             o.interleaved,
             static_cast<float>(o.eps),
             c.q_weight ? c.q_weight->const_data_ptr() : nullptr,
             c.k_weight ? c.k_weight->const_data_ptr() : nullptr,
             c.tables ? c.tables->cos_data() : nullptr,
             c.tables ? c.tables->sin_data() : nullptr,
             c.tables ? c.tables->positions_data() : nullptr};
  return c;
}

Checked check_qkv(const std::string& op, const Tensor& qkv, const Options& o) {
  float_dtype(qkv, (op + ": qkv").c_str());
  const int64_t heads = o.num_heads + 2 * o.num_kv_heads;
  LLMCORE_CHECK(o.num_heads >= 1 && o.num_kv_heads >= 1, op, ": num_heads is ", o.num_heads, ", num_kv_heads ",
                o.num_kv_heads, "; accepted: 1 or more");
  LLMCORE_CHECK((qkv.dim() == 2 || qkv.dim() == 3) && qkv.size(-1) % heads == 0, op, ": qkv has shape ",
                shape_text(qkv), "; expected (batch, seq, features) or (total, features) with features = ", heads,
                " heads times head_dim");
  LLMCORE_CHECK(qkv.size(-1) > 0, op, ": qkv has shape ", shape_text(qkv), "; the last dimension must not be empty");
  return check(op, "qkv", qkv, qkv.size(-1) / heads, o);
}

Tensor new_heads(const Tensor& qkv, int64_t heads, int64_t head_dim) {
  if (qkv.dim() == 2) return empty(qkv, {qkv.size(0), heads, head_dim});
  return empty(qkv, {qkv.size(0), qkv.size(1), heads, head_dim});
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope(const Tensor& qkv, int64_t num_heads, int64_t num_kv_heads,
                                                const OptTensor& cos, const OptTensor& sin, const OptTensor& positions,
                                                const OptTensor& q_weight, const OptTensor& k_weight, double eps,
                                                bool interleaved) {
  const Options options{num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight, eps, interleaved};
  const Checked c = check_qkv("qk_norm_rope", qkv, options);
  const Rows rows = as_rows(qkv);
  Tensor q = new_heads(qkv, num_heads, c.heads.head_dim), k = new_heads(qkv, num_kv_heads, c.heads.head_dim);
  Tensor v = new_heads(qkv, num_kv_heads, c.heads.head_dim);
  cpu::qk_norm_rope({c.heads, rows.tensor.const_data_ptr(), rows.stride, q.mutable_data_ptr(), k.mutable_data_ptr(),
                     v.mutable_data_ptr(), nullptr},
                    torch_parallel());
  return {q, k, v};
}

Tensor qk_norm_rope_cache_write(const Tensor& qkv, int64_t num_heads, int64_t num_kv_heads, const Tensor& k_cache,
                                const Tensor& v_cache, const Tensor& slot_mapping, const OptTensor& cos,
                                const OptTensor& sin, const OptTensor& positions, const OptTensor& q_weight,
                                const OptTensor& k_weight, double eps, bool interleaved, const OptTensor& k_scale,
                                const OptTensor& v_scale) {
  const std::string op = "qk_norm_rope_cache_write";
  const Options options{num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight, eps, interleaved};
  check_dim(qkv, 2, (op + ": qkv").c_str(), "(tokens, features)");
  const Checked c = check_qkv(op, qkv, options);
  const int64_t dim = c.heads.head_dim, size = num_kv_heads * dim;
  Rows rows = as_rows(qkv);
  const auto heads = [&](int64_t begin) {  // (tokens, num_kv_heads, head_dim) from column `begin` on
    const Tensor columns = torch::stable::narrow(rows.tensor, 1, begin, size);
    return torch::stable::view(columns, {qkv.size(0), num_kv_heads, dim});
  };
  const Tensor k = heads(num_heads * dim), v = heads(num_heads * dim + size);
  const CacheWrite write = checked_cache_write(op, k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale);
  Tensor q = new_heads(qkv, num_heads, dim);
  cpu::qk_norm_rope(
      {c.heads, rows.tensor.const_data_ptr(), rows.stride, q.mutable_data_ptr(), nullptr, nullptr, &write.params},
      torch_parallel());
  return q;
}

// A gradient with a contiguous last dimension, or none.
struct Gradient {
  OptTensor tensor;
  HeadGradient params;

  Gradient(const OptTensor& t, const char* name, const Tensor& like, int64_t heads) : params{nullptr, {0, 0, 0}} {
    if (!t) return;
    const std::string what = std::string("qk_norm_rope_backward: ") + name;
    if (like.dim() == 3)
      check_like(*t, like, {like.size(0), heads, like.size(2)}, what.c_str(), "the others");
    else
      check_like(*t, like, {like.size(0), like.size(1), heads, like.size(3)}, what.c_str(), "the others");
    tensor = last_dim_contiguous(*t);
    const int64_t d = t->dim() - 3;  // the sequence dimension
    params = {tensor->const_data_ptr(), {d ? tensor->stride(0) : 0, tensor->stride(d), tensor->stride(d + 1)}};
  }
};

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_backward(const OptTensor& dq, const OptTensor& dk, const OptTensor& dv,
                                                         const OptTensor& qkv, int64_t num_heads, int64_t num_kv_heads,
                                                         const OptTensor& cos, const OptTensor& sin,
                                                         const OptTensor& positions, const OptTensor& q_weight,
                                                         const OptTensor& k_weight, double eps, bool interleaved) {
  const std::string op = "qk_norm_rope_backward";
  LLMCORE_CHECK(dq || dk || dv, op, ": dq, dk and dv are missing; at least one is needed");
  const Tensor& like = dq ? *dq : dk ? *dk : *dv;
  LLMCORE_CHECK(like.dim() == 3 || like.dim() == 4, op, ": the gradients have shape ", shape_text(like),
                "; expected (batch, seq, heads, head_dim) or (total, heads, head_dim)");
  const Gradient q(dq, "dq", like, num_heads), k(dk, "dk", like, num_kv_heads), v(dv, "dv", like, num_kv_heads);
  const Options options{num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight, eps, interleaved};
  const int64_t dim = like.size(-1), features = (num_heads + 2 * num_kv_heads) * dim;
  const Checked c = check(op, "the gradient", like, dim, options);
  LLMCORE_CHECK(qkv || !(q_weight || k_weight), op, ": qkv is missing; the gradient of a norm needs it");
  Rows rows{like, 0, 0, 0};
  if (qkv) {
    if (like.dim() == 3)
      check_like(*qkv, like, {like.size(0), features}, (op + ": qkv").c_str(), "the gradients");
    else
      check_like(*qkv, like, {like.size(0), like.size(1), features}, (op + ": qkv").c_str(), "the gradients");
    rows = as_rows(*qkv);
  }
  Tensor dqkv =
      like.dim() == 3 ? empty(like, {like.size(0), features}) : empty(like, {like.size(0), like.size(1), features});
  const int64_t block = qk_sum_tokens(num_heads), blocks = (c.heads.tokens + block - 1) / block;
  const auto partials = [&](bool wanted) {
    return wanted ? zeros(like, {blocks, dim}, ScalarType::Float) : empty(like, {0}, ScalarType::Float);
  };
  const auto data = [](const Tensor& t, bool wanted) {
    return wanted ? static_cast<float*>(t.mutable_data_ptr()) : nullptr;
  };
  const Tensor dq_weight = partials(q_weight.has_value()), dk_weight = partials(k_weight.has_value());
  cpu::qk_norm_rope_backward(
      {c.heads, q.params, k.params, v.params, qkv ? rows.tensor.const_data_ptr() : nullptr, rows.stride,
       dqkv.mutable_data_ptr(), data(dq_weight, q_weight.has_value()), data(dk_weight, k_weight.has_value())},
      torch_parallel());
  const auto sum = [&](const Tensor& t, const OptTensor& weight) {
    return weight ? sum_partials(t, like.scalar_type()) : empty(like, {0});
  };
  return {dqkv, sum(dq_weight, q_weight), sum(dk_weight, k_weight)};
}

void qk_norm_rope_check(const std::string& op, const Tensor& qkv, int64_t num_heads, int64_t num_kv_heads,
                        const OptTensor& cos, const OptTensor& sin, const OptTensor& positions,
                        const OptTensor& q_weight, const OptTensor& k_weight, double eps) {
  check_qkv(op, qkv, {num_heads, num_kv_heads, cos, sin, positions, q_weight, k_weight, eps, false});
}

template <class Library>
void register_check(Library& m) {
  m.impl("qk_norm_rope_check", TORCH_BOX(&qk_norm_rope_check));
}

}  // namespace

LLMCORE_REGISTER(register_check)

STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
  m.impl("qk_norm_rope_cache_write", TORCH_BOX(&qk_norm_rope_cache_write));
}

}  // namespace llmcore
