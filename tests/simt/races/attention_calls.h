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

}  // namespace races
