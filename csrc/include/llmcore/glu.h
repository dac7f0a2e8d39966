// Gated linear units: act(gate) * up (Shazeer, arXiv 2002.05202). SwiGLU is silu, GEGLU is gelu.
#pragma once
#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

enum class Activation : int { silu, gelu_tanh, gelu_erf };

// Rows are addressed by a stride in elements (gate and up may be halves of one projection); the last dimension is
// contiguous.
struct GluParams {
  DType dtype;  // of gate, up, y
  Activation activation;
  int64_t rows, dim;  // dim >= 1
  const void* gate;   // (rows, dim)
  int64_t gate_stride;
  const void* up;  // (rows, dim)
  int64_t up_stride;
  void* y;  // (rows, dim), contiguous
};

struct GluBackwardParams {
  DType dtype;
  Activation activation;
  int64_t rows, dim;
  const void* dy;  // (rows, dim)
  int64_t dy_stride;
  const void* gate;  // (rows, dim)
  int64_t gate_stride;
  const void* up;  // (rows, dim)
  int64_t up_stride;
  void* dgate;       // (rows, dim)
  void* dup;         // (rows, dim)
  int64_t d_stride;  // of both
};

LLMCORE_CPU_KERNEL_BF16(glu_forward, GluParams)
LLMCORE_CPU_KERNEL_BF16(glu_backward, GluBackwardParams)
LLMCORE_CUDA_KERNEL(glu_forward, GluParams)
LLMCORE_CUDA_KERNEL(glu_backward, GluBackwardParams)

}  // namespace llmcore
