// Rotary position embedding (Su et al., arXiv 2104.09864).
#pragma once
#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

// The first rotary_dim elements of each head are rotated in pairs by the angle of the token's position, the rest is
// copied. Pair i is (i, i + rotary_dim/2), or (2i, 2i + 1) when interleaved:
//   y_first = x_first * cos_i - x_second * sin_i;  y_second = x_second * cos_i + x_first * sin_i
// `inverse` rotates by the negative angle, which is also the gradient. Strides are in elements; the last dimension is
// contiguous. y may be x itself (with the same strides).
struct RopeParams {
  DType dtype;  // of x, y
  int64_t batch, seq, heads, head_dim, rotary_dim;
  bool interleaved, inverse;
  const void* x;  // (batch, seq, heads, head_dim)
  int64_t x_strides[3];
  void* y;  // (batch, seq, heads, head_dim)
  int64_t y_strides[3];
  const float* cos;          // (max_positions, rotary_dim / 2), contiguous
  const float* sin;          // (max_positions, rotary_dim / 2), contiguous
  const int64_t* positions;  // (batch, seq), contiguous, each in [0, max_positions); null: 0, 1, ... seq - 1
};

LLMCORE_CPU_KERNEL_BF16(rope, RopeParams)
LLMCORE_CUDA_KERNEL(rope, RopeParams)

}  // namespace llmcore
