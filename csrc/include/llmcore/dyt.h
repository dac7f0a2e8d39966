// Dynamic tanh, the element-wise layer that stands in for normalisation (Zhu et al., arXiv 2503.10622).
#pragma once
#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

// y = tanh(alpha * x) * weight + bias. Rows are addressed by a stride in elements; the last dimension is contiguous.
struct DytParams {
  DType dtype;        // of x, alpha, weight, bias, y
  int64_t rows, dim;  // dim >= 1
  const void* x;      // (rows, dim)
  int64_t x_stride;
  const void* alpha;   // (1)
  const void* weight;  // (dim)
  const void* bias;    // (dim) or null
  void* y;             // (rows, dim), contiguous
};

struct DytBackwardParams {
  DType dtype;
  int64_t rows, dim;
  const void* dy;  // (rows, dim)
  int64_t dy_stride;
  const void* x;  // (rows, dim)
  int64_t x_stride;
  const void* alpha;       // (1)
  const void* weight;      // (dim)
  void* dx;                // (rows, dim), contiguous
  double* dalpha_partial;  // (ceil(rows / kSumRows)): one partial sum per block of rows; each is of many, hence double
  float* dweight_partial;  // (ceil(rows / kSumRows), dim), zeroed
  float* dbias_partial;    // likewise, or null when there is no bias
};

LLMCORE_CPU_KERNEL_BF16(dyt_forward, DytParams)
LLMCORE_CPU_KERNEL_BF16(dyt_backward, DytBackwardParams)
LLMCORE_CUDA_KERNEL(dyt_forward, DytParams)
LLMCORE_CUDA_KERNEL(dyt_backward, DytBackwardParams)

}  // namespace llmcore
