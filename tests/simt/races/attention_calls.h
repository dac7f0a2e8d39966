// Small attention calls that the cases of attention share: grouped heads, lengths that are no multiple of a tile.
#pragma once
#include <cmath>

#include "case.h"
#include "llmcore/attention.h"

namespace races {

constexpr DType kHalves[] = {DType::bf16, DType::f16};

inline llmcore::RowStrides packed_strides(int64_t heads, int64_t dim) { return {0, heads * dim, dim}; }
inline llmcore::RowStrides dense_strides(int64_t rows, int64_t heads, int64_t dim) {
  return {rows * heads * dim, heads * dim, dim};
}

template <class Shape>
void set_total_k(Shape& shape, int64_t total_k) {
  if constexpr (requires { shape.total_k; }) shape.total_k = total_k;  // a field that not every version has
}

// batch sequences of seq_q queries and seq_k keys each.
inline llmcore::AttentionShape dense_shape(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                           int64_t v_head_dim, int64_t seq_q, int64_t seq_k) {
  llmcore::AttentionShape s{};
  s.batch = batch;
  s.heads = heads;
  s.kv_heads = kv_heads;
  s.head_dim = head_dim;
  s.v_head_dim = v_head_dim;
  s.seq_q = seq_q;
  s.seq_k = seq_k;
  s.total_q = batch * seq_q;
  set_total_k(s, batch * seq_k);
  return s;
}

inline llmcore::AttentionMask causal_mask(int64_t head_dim) {
  llmcore::AttentionMask m{};
  m.scale = 1.f / std::sqrt(static_cast<float>(head_dim));
  m.causal = true;
  return m;
}

// Bytes that hold NaN until somebody writes them, as a workspace may.
inline Tensor workspace(int64_t bytes) { return Tensor(DType::i8, bytes); }

// What calls with 70 queries and 133 keys, of one head size, are made of: dense, or packed as three sequences.
struct Call {
  static constexpr int64_t kHeads = 2, kKvHeads = 1, kSeqQ = 70, kSeqK = 133;

  DType dtype;
  int64_t dim;
  Tensor q = random_normal(dtype, kSeqQ* kHeads* dim), k = random_normal(dtype, kSeqK* kKvHeads* dim),
         v = random_normal(dtype, k.size()), sinks = random_normal(DType::f32, kHeads);
  Tensor out = Tensor(dtype, q.size()), lse = Tensor(DType::f32, kHeads* kSeqQ);
  std::vector<int32_t> cu_q = {0, 3, 3, kSeqQ}, cu_k = {0, 20, 21, kSeqK};

  llmcore::AttentionParams forward(bool packed) const {  // causal
    llmcore::AttentionParams p{};
    p.shape = dense_shape(1, kHeads, kKvHeads, dim, dim, kSeqQ, kSeqK);
    if (packed) {
      p.shape.batch = 3;
      p.shape.seq_q = p.shape.seq_k = 0;
      p.shape.cu_q = cu_q.data();
      p.shape.cu_k = cu_k.data();
    }
    p.mask = causal_mask(dim);
    p.q_dtype = p.kv_dtype = dtype;
    p.q = q.data();
    p.k = k.data();
    p.v = v.data();
    p.q_strides = p.out_strides = packed_strides(kHeads, dim);
    p.k_strides = p.v_strides = packed_strides(kKvHeads, dim);
    p.out = out.data();
    p.lse = lse.as<float>();
    p.lse_head = kSeqQ;
    return p;
  }
};

}  // namespace races
