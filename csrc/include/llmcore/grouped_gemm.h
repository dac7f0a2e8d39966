// One matrix product per expert, over rows sorted by expert.
#pragma once
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

// y[r] = x[r] B_e for the rows r of expert e, offsets[e] <= r < offsets[e + 1]. Element (i, j) of B_e (k, n) stands at
// weight[e * expert_stride + i * k_stride + j * n_stride], with one of the two strides 1: the forward pass and the
// gradient of x are the same kernel.
struct GroupedGemmParams {
  DType dtype;  // of x, weight, y
  int64_t num_experts, n, k;
  const void* x;  // (rows, k)
  int64_t x_stride;
  const void* weight;
  int64_t expert_stride, k_stride, n_stride;
  const int32_t* offsets;  // (num_experts + 1): from 0 to rows, never falling
  void* y;                 // (rows, n), contiguous
};

// dweight[e] = sum over the rows r of expert e of dy[r]^T x[r]; 0 for an expert without rows.
struct GroupedGemmWeightGradParams {
  DType dtype;  // of dy, x, dweight
  int64_t num_experts, n, k;
  const void* dy;  // (rows, n)
  int64_t dy_stride;
  const void* x;  // (rows, k)
  int64_t x_stride;
  const int32_t* offsets;  // (num_experts + 1)
  void* dweight;           // (num_experts, n, k), contiguous
};

LLMCORE_CPU_KERNEL_BF16(grouped_gemm, GroupedGemmParams)
LLMCORE_CPU_KERNEL_BF16(grouped_gemm_weight_grad, GroupedGemmWeightGradParams)

}  // namespace llmcore
