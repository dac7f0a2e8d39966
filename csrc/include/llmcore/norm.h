// RMS normalisation (Zhang & Sennrich, arXiv 1910.07467) and layer normalisation (Ba et al., arXiv 1607.06450) with an
// optional fused residual addition.
#pragma once
#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

// z = x + residual (when given); over the last dimension, y = z / sqrt(mean(z^2) + eps) * weight (RMS), or
// y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias (layer).
// Rows are addressed by a stride in elements; the last dimension is contiguous.
struct NormParams {
  DType dtype;        // of x, residual, weight, bias, y, z
  int64_t rows, dim;  // dim >= 1
  float eps;
  const void* x;  // (rows, dim)
  int64_t x_stride;
  const void* residual;  // (rows, dim) or null
  int64_t residual_stride;
  const void* weight;  // (dim)
  const void* bias;    // (dim) or null; RMS: null
  void* y;             // (rows, dim), contiguous
  void* z;             // (rows, dim), contiguous; null when there is no residual
  float* mean;         // (rows), for the backward pass; RMS: null
  float* rstd;         // (rows): 1 / the square root above, for the backward pass
};

struct NormBackwardParams {
  DType dtype;
  int64_t rows, dim;
  const void* dy;  // (rows, dim)
  int64_t dy_stride;
  const void* dz;  // (rows, dim) gradient that reaches z from elsewhere (the residual stream), or null
  int64_t dz_stride;
  const void* z;  // (rows, dim): the normalised input
  int64_t z_stride;
  const void* weight;      // (dim)
  const float* mean;       // (rows); RMS: null
  const float* rstd;       // (rows)
  void* dx;                // (rows, dim), contiguous: gradient of x, and of the residual
  float* dweight_partial;  // (ceil(rows / kSumRows), dim), zeroed: one partial sum per block of rows
  float* dbias_partial;    // likewise, or null when there is no bias
};

LLMCORE_CPU_KERNEL_BF16(rms_norm_forward, NormParams)
LLMCORE_CPU_KERNEL_BF16(rms_norm_backward, NormBackwardParams)
LLMCORE_CPU_KERNEL_BF16(layer_norm_forward, NormParams)
LLMCORE_CPU_KERNEL_BF16(layer_norm_backward, NormBackwardParams)
LLMCORE_CUDA_KERNEL(rms_norm_forward, NormParams)
LLMCORE_CUDA_KERNEL(rms_norm_backward, NormBackwardParams)
LLMCORE_CUDA_KERNEL(layer_norm_forward, NormParams)
LLMCORE_CUDA_KERNEL(layer_norm_backward, NormBackwardParams)

}  // namespace llmcore
