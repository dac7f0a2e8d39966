// One matrix product per expert, over rows sorted by expert.
#pragma once
#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/glu.h"
#include "llmcore/isa.h"

namespace llmcore {

// y[r] = x[r] B_e for the rows r of expert e, offsets[e] <= r < offsets[e + 1]. Element (i, j) of B_e (k, n) stands at
// weight[e * expert_stride + i * k_stride + j * n_stride], with one of the two strides 1: the forward pass and the
// gradient of x are the same kernel. With token_of, row r reads x[token_of[r]].
struct GroupedGemmParams {
  DType dtype;  // of x, weight, y
  int64_t rows, num_experts, n, k;
  const void* x;  // (rows, k); with token_of (tokens, k)
  int64_t x_stride;
  const void* weight;
  int64_t expert_stride, k_stride, n_stride;
  const int32_t* offsets;   // (num_experts + 1): from 0 to rows, never falling
  const int32_t* token_of;  // (rows), or null
  void* y;                  // (rows, n), contiguous
  void* workspace;          // CUDA: grouped_gemm_workspace() bytes, aligned to 16; CPU: null
};

// out[r] = act(gate[r]) * up[r], where (gate, up) are the halves of y[r] of `product`, n / 2 columns each. That y may
// be null: then it is written nowhere. k_stride is 1.
struct GroupedGluParams {
  GroupedGemmParams product;
  Activation activation;  // silu or gelu_tanh
  void* out;              // (rows, n / 2), contiguous
  void* workspace;        // CUDA: grouped_glu_workspace() bytes, aligned to 16 (not product's); CPU: null
};

// dweight[e] = sum over the rows r of expert e of dy[r]^T x[r]; 0 for an expert without rows. With token_of, x[r] is
// x[token_of[r]].
struct GroupedGemmWeightGradParams {
  DType dtype;  // of dy, x, dweight
  int64_t num_experts, n, k;
  const void* dy;  // (rows, n)
  int64_t dy_stride;
  const void* x;  // (rows, k); with token_of (tokens, k)
  int64_t x_stride;
  const int32_t* offsets;   // (num_experts + 1)
  const int32_t* token_of;  // (rows), or null
  void* dweight;            // (num_experts, n, k), contiguous
};

LLMCORE_CPU_KERNEL_BF16(grouped_gemm, GroupedGemmParams)
LLMCORE_CPU_KERNEL_BF16(grouped_glu, GroupedGluParams)
LLMCORE_CPU_KERNEL_BF16(grouped_gemm_weight_grad, GroupedGemmWeightGradParams)
LLMCORE_CUDA_KERNEL(grouped_gemm, GroupedGemmParams)
LLMCORE_CUDA_KERNEL(grouped_glu, GroupedGluParams)
LLMCORE_CUDA_KERNEL(grouped_gemm_weight_grad, GroupedGemmWeightGradParams)

namespace cuda {
// Bytes of device memory that the launcher needs for a call, computed from the shapes alone.
int64_t grouped_gemm_workspace(const GroupedGemmParams& p, const Device& device);
int64_t grouped_glu_workspace(const GroupedGluParams& p, const Device& device);
}  // namespace cuda

}  // namespace llmcore
