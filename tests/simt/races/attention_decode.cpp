#include "attention_decode.cuh"

#include <numeric>

#include "attention_calls.h"

using namespace llmcore;
using namespace races;

namespace {

constexpr int64_t kBlockSize = 16, kBlocks = 20;

struct Decoding {
  const char* label;
  int64_t heads, kv_heads, dim;
  std::vector<int32_t> lengths, queries;  // of each sequence; no queries: one each, without cu_q
  int64_t table;                          // blocks of each sequence that the table has room for
  bool one_split;
};

// Sequences over a paged cache of q's dtype, or of 8 bits.
void run(const Decoding& call, DType dtype, DType kv_dtype) {
  const int64_t batch = static_cast<int64_t>(call.lengths.size()), dim = call.dim;
  const int64_t total = call.queries.empty() ? batch : std::accumulate(call.queries.begin(), call.queries.end(), 0);
  std::vector<int32_t> table(batch * call.table, -1), cu_q(1, 0);
  for (int32_t n : call.queries) cu_q.push_back(cu_q.back() + n);
  int32_t taken = 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i * kBlockSize < call.lengths[b]; ++i) table[b * call.table + i] = 7 * taken++ % kBlocks;
  const int64_t rows = kBlocks * kBlockSize * call.kv_heads;
  const bool scaled = has_scales(kv_dtype);
  const Tensor q = random_normal(dtype, total * call.heads * dim),
               k = scaled ? random_uniform(kv_dtype, rows * dim, -127, 127) : random_normal(dtype, rows * dim),
               v = scaled ? random_uniform(kv_dtype, rows * dim, -127, 127) : random_normal(dtype, rows * dim),
               k_scale = random_uniform(DType::f32, rows, 0.01, 0.02),
               v_scale = random_uniform(DType::f32, rows, 0.01, 0.02);
  Tensor out(dtype, q.size());
  AttentionParams p{};
  p.shape = dense_shape(batch, call.heads, call.kv_heads, dim, dim, 1, 0);
  if (!call.queries.empty()) {
    p.shape.cu_q = cu_q.data();
    p.shape.seq_q = 0;
    p.shape.total_q = total;
  }
  p.shape.block_table = table.data();
  p.shape.table_stride = call.table;
  p.shape.block_size = kBlockSize;
  p.shape.kv_lens = call.lengths.data();
  p.mask = causal_mask(dim);
  p.q_dtype = dtype;
  p.kv_dtype = kv_dtype;
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  if (call.queries.empty())
    p.q_strides = p.out_strides = {call.heads * dim, 0, dim};
  else
    p.q_strides = p.out_strides = {0, call.heads * dim, dim};
  p.k_strides = p.v_strides = dense_strides(kBlockSize, call.kv_heads, dim);
  p.k_scale = scaled ? k_scale.as<float>() : nullptr;
  p.v_scale = scaled ? v_scale.as<float>() : nullptr;
  p.out = out.data();
  if (!cuda::attention_decode_serves(p, kDevice)) throw std::runtime_error("the prefill kernel takes the call");
  const int64_t bytes = cuda::attention_decode_workspace(p, kDevice);
  if ((bytes == 0) != call.one_split) throw std::runtime_error("not the expected number of splits");
  const Tensor memory = workspace(bytes);
  p.workspace = memory.data();
  check(call.label, cuda::attention_decode, cpu::portable::attention_forward, p, {{"out", out}});
}

}  // namespace

RACE_CASE(attention_decode) {
  const Decoding calls[] = {
      {"one query each", 4, 1, 64, {100, 0, 37}, {}, 8, false},
      {"one split", 4, 2, 64, {100, 0, 37}, {}, 8, true},
      {"two tiles of rows", 80, 1, 64, {130}, {}, 9, false},
      {"several queries", 2, 1, 64, {100, 0, 37}, {9, 0, 2}, 8, false},
      {"columns divided among warps", 4, 1, 256, {70}, {}, 5, false},
  };
  for (const Decoding& call : calls)
    for (DType dtype : kHalves)
      for (DType kv_dtype : {dtype, DType::i8, DType::f8}) run(call, dtype, kv_dtype);
}
