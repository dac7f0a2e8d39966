#include "attention_decode.cuh"

#include "attention_calls.h"

using namespace llmcore;
using namespace races;

// One query for each of three sequences over a paged cache: of q's dtype, and of 8 bits.
RACE_CASE(attention_decode) {
  constexpr int64_t kBatch = 3, kHeads = 4, kKvHeads = 2, kDim = 64, kBlockSize = 16, kBlocks = 20, kTable = 8;
  const std::vector<int32_t> lengths = {100, 0, 37};
  std::vector<int32_t> table(kBatch * kTable, -1);
  for (int64_t i = 0; i < 7; ++i) table[i] = static_cast<int32_t>(19 - 2 * i);
  for (int64_t i = 0; i < 3; ++i) table[2 * kTable + i] = static_cast<int32_t>(2 * i);
  for (DType dtype : kHalves)
    for (DType kv_dtype : {dtype, DType::i8, DType::f8}) {
      constexpr int64_t kRows = kBlocks * kBlockSize * kKvHeads;
      const bool scaled = has_scales(kv_dtype);
      const Tensor q = random_normal(dtype, kBatch * kHeads * kDim),
                   k = scaled ? random_uniform(kv_dtype, kRows * kDim, -127, 127) : random_normal(dtype, kRows * kDim),
                   v = scaled ? random_uniform(kv_dtype, kRows * kDim, -127, 127) : random_normal(dtype, kRows * kDim),
                   k_scale = random_uniform(DType::f32, kRows, 0.01, 0.02),
                   v_scale = random_uniform(DType::f32, kRows, 0.01, 0.02);
      Tensor out(dtype, q.size());
      AttentionParams p{};
      p.shape = dense_shape(kBatch, kHeads, kKvHeads, kDim, kDim, 1, 0);
      p.shape.block_table = table.data();
      p.shape.table_stride = kTable;
      p.shape.block_size = kBlockSize;
      p.shape.kv_lens = lengths.data();
      p.mask = causal_mask(kDim);
      p.q_dtype = dtype;
      p.kv_dtype = kv_dtype;
      p.q = q.data();
      p.k = k.data();
      p.v = v.data();
      p.q_strides = p.out_strides = {kHeads * kDim, 0, kDim};
      p.k_strides = p.v_strides = dense_strides(kBlockSize, kKvHeads, kDim);
      p.k_scale = scaled ? k_scale.as<float>() : nullptr;
      p.v_scale = scaled ? v_scale.as<float>() : nullptr;
      p.out = out.data();
      const Tensor memory = workspace(cuda::attention_decode_workspace(p, kDevice));
      p.workspace = memory.data();
      check(name(kv_dtype), cuda::attention_decode, cpu::portable::attention_forward, p, {{"out", out}});
    }
}
