// The L2 norm of all elements of a list of tensors, as gradient clipping needs it (Pascanu et al., arXiv 1211.5063).
#pragma once
#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

// Tensors are cut into tiles of this many elements, numbered through the whole list; a tile's sum is one partial. So
// which sums there are depends on nothing but the tensors' sizes.
constexpr int64_t kNormTile = 32768;

struct NormTensor {
  int64_t size, first_tile;  // elements; the tiles of the tensors before this one
  const void* data;          // (size)
};

// norm = sqrt(sum of squares). Squares are added in float32 over short stretches only, from there on in float64.
struct GlobalNormParams {
  DType dtype;
  int64_t count, tiles;       // tensors; their tiles in all
  const NormTensor* tensors;  // (count), in the host's memory
  double* partials;           // (tiles), need not be set
  float* norm;                // (1)
};

LLMCORE_CPU_KERNEL(global_norm, GlobalNormParams)
LLMCORE_CUDA_KERNEL(global_norm, GlobalNormParams)

}  // namespace llmcore
