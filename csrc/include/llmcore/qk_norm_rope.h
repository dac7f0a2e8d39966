// The way from a fused projection of queries, keys and values to attention, in one pass: RMS normalisation of the heads
// of q and k (optional), rotary embedding (optional), and for generation the cache write. CPU only: on a CUDA device
// the op is a composition of the kernels in norm.h, rope.h and kv_cache_write.h.
#pragma once
#include "llmcore/dtype.h"
#include "llmcore/isa.h"
#include "llmcore/kv_cache_write.h"

namespace llmcore {

// Token t of `tokens` is t % seq of its sequence. A weight that is null leaves those heads without a norm.
struct QkHeads {
  DType dtype;  // of everything but the tables and the cache
  int64_t tokens, seq, num_heads, num_kv_heads, head_dim, rotary_dim;
  bool interleaved;
  float eps;
  const void* q_weight;  // (head_dim) or null
  const void* k_weight;
  const float *cos, *sin;    // (max_positions, rotary_dim / 2), contiguous; null when rotary_dim is 0
  const int64_t* positions;  // (tokens), each in [0, max_positions); null: t % seq
};

// A row of qkv holds the query heads, the key heads, the value heads. q and k are normalised, then rotated; in float32,
// rounded once. v is copied, so that nothing keeps qkv alive.
struct QkNormRopeParams {
  QkHeads heads;
  const void* qkv;  // (tokens, (num_heads + 2 num_kv_heads) head_dim)
  int64_t qkv_stride;
  void *q, *k, *v;  // (tokens, num_heads or num_kv_heads, head_dim), contiguous; k and v are null with a cache
  const KvCacheWriteParams* cache;  // where k and v go; its sources are not used. Null without
};

struct HeadGradient {
  const void* data;    // (batch, seq, heads, head_dim); null: zeros
  int64_t strides[3];  // of batch, seq, head
};

struct QkNormRopeBackwardParams {
  QkHeads heads;
  HeadGradient dq, dk, dv;
  const void* qkv;  // as above; null without weights
  int64_t qkv_stride;
  void* dqkv;  // (tokens, (num_heads + 2 num_kv_heads) head_dim), contiguous
  float *dq_weight_partial,
      *dk_weight_partial;  // (blocks of qk_sum_tokens(), head_dim), zeroed; null without the weight
};

// Tokens whose gradients of a weight go into one partial sum: about kSumRows heads.
static inline int64_t qk_sum_tokens(int64_t num_heads) {
  return num_heads > 0 && num_heads < kSumRows ? kSumRows / num_heads : 1;
}

LLMCORE_CPU_KERNEL_BF16(qk_norm_rope, QkNormRopeParams)
LLMCORE_CPU_KERNEL_BF16(qk_norm_rope_backward, QkNormRopeBackwardParams)

}  // namespace llmcore
