// RMS normalisation with an optional fused residual addition (Zhang & Sennrich, arXiv 1910.07467).
#pragma once
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

// z = x + residual (when given); y = z / sqrt(mean(z^2) + eps) * weight, over the last dimension.
// Rows are addressed by a stride in elements; the last dimension is contiguous.
struct RmsNormParams {
  DType dtype;        // of x, residual, weight, y, z
  int64_t rows, dim;  // dim >= 1
  float eps;
  const void* x;  // (rows, dim)
  int64_t x_stride;
  const void* residual;  // (rows, dim) or null
  int64_t residual_stride;
  const void* weight;  // (dim)
  void* y;             // (rows, dim), contiguous
  void* z;             // (rows, dim), contiguous; null when there is no residual
  float* rstd;         // (rows): 1 / sqrt(mean(z^2) + eps), for the backward pass
};

struct RmsNormBackwardParams {
  DType dtype;
  int64_t rows, dim;
  const void* dy;  // (rows, dim)
  int64_t dy_stride;
  const void* dz;  // (rows, dim) gradient that reaches z from elsewhere (the residual stream), or null
  int64_t dz_stride;
  const void* z;  // (rows, dim): the normalised input
  int64_t z_stride;
  const void* weight;      // (dim)
  const float* rstd;       // (rows)
  void* dx;                // (rows, dim), contiguous: gradient of x, and of the residual
  float* dweight_partial;  // (threads, dim), zeroed: one partial sum per worker
};

LLMCORE_CPU_KERNEL(rms_norm_forward, RmsNormParams)
LLMCORE_CPU_KERNEL(rms_norm_backward, RmsNormBackwardParams)

}  // namespace llmcore
