// y = x W^T + bias for few rows of x: bound by the memory that holds W.
#pragma once
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

constexpr int64_t kLinearRows = 32;  // the most rows the kernel takes

// y[r][j] = bias[j] + sum_i x[r][i] weight[j][i], rows <= kLinearRows. A CUDA device takes torch's product.
struct LinearParams {
  DType dtype;  // of x, weight, bias, y
  int64_t rows, n, k;
  const void* x;  // (rows, k)
  int64_t x_stride;
  const void* weight;  // (n, k)
  int64_t weight_stride;
  const void* bias;  // (n), or null
  void* y;           // (rows, n), contiguous
};

LLMCORE_CPU_KERNEL_BF16(linear, LinearParams)

}  // namespace llmcore
