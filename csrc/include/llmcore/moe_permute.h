// Rows of a mixture-of-experts layer to expert-contiguous order and back. An assignment is a (token, slot) pair, slot
// in [0, top_k); row_of (tokens, top_k) is a permutation that says which sorted row holds it.
#pragma once
#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

// Stable counting sort of the assignments by expert.
struct MoeSortParams {
  int64_t tokens, top_k, num_experts;
  const int32_t* experts;  // (tokens, top_k), each in [0, num_experts); CUDA: one outside counts as the nearest inside
  int32_t* offsets;        // (num_experts + 1): rows offsets[e] .. offsets[e + 1] belong to expert e
  int32_t* row_of;         // (tokens, top_k)
  int32_t* token_of;       // (tokens * top_k): token_of[row_of[t, j]] = t; or null
  void* workspace;         // CUDA: moe_sort_workspace() bytes, aligned to 16; CPU: null
};

// sorted[row_of[t, j]] = weights[t, j] * x[t]; with y also dweights[t, j] = y[row_of[t, j]] . x[t].
struct MoeScatterParams {
  DType dtype;  // of x, y, sorted
  int64_t tokens, top_k, dim;
  const void* x;  // (tokens, dim)
  int64_t x_stride;
  const int32_t* row_of;  // (tokens, top_k)
  const float* weights;   // (tokens, top_k), or null: all 1
  void* sorted;           // (tokens * top_k, dim), contiguous
  const void* y;          // (tokens * top_k, dim) or null
  int64_t y_stride;
  float* dweights;  // (tokens, top_k), with y
};

// out[t] = sum_j weights[t, j] * sorted[row_of[t, j]], summed in float32 over ascending j.
struct MoeGatherParams {
  DType dtype;  // of sorted, out
  int64_t tokens, top_k, dim;
  const void* sorted;  // (tokens * top_k, dim)
  int64_t sorted_stride;
  const int32_t* row_of;  // (tokens, top_k)
  const float* weights;   // (tokens, top_k), or null: all 1
  void* out;              // (tokens, dim), contiguous
};

LLMCORE_CPU_KERNEL(moe_sort, MoeSortParams)
LLMCORE_CPU_KERNEL(moe_scatter, MoeScatterParams)
LLMCORE_CPU_KERNEL(moe_gather, MoeGatherParams)

LLMCORE_CUDA_KERNEL(moe_sort, MoeSortParams)
LLMCORE_CUDA_KERNEL(moe_scatter, MoeScatterParams)
LLMCORE_CUDA_KERNEL(moe_gather, MoeGatherParams)

namespace cuda {
int64_t moe_sort_workspace(const MoeSortParams& p, const Device& device);
}

}  // namespace llmcore
