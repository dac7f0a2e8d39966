// Gated linear units: element-wise, so each thread takes 16 bytes of a row at a time and nothing is shared. Bound by
// memory: 3 elements move per result forward, 5 backward.
#include "llmcore/glu.h"

#include "activations.cuh"
#include "launch.cuh"
#include "vec.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// The grid's x covers a row, its y the rows (in strides, when there are more than it may have).
template <class T, class Act, int Width>
__global__ void __launch_bounds__(kThreads) forward(GluParams p) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * Width;
  if (column >= p.dim) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    float gate[Width], up[Width];
    load(static_cast<const T*>(p.gate) + row * p.gate_stride + column, gate);
    load(static_cast<const T*>(p.up) + row * p.up_stride + column, up);
#pragma unroll
    for (int i = 0; i < Width; ++i) up[i] *= Act::value(gate[i]);
    store(static_cast<T*>(p.y) + row * p.dim + column, up);
  }
}

template <class T, class Act, int Width>
__global__ void __launch_bounds__(kThreads) backward(GluBackwardParams p) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * Width;
  if (column >= p.dim) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    float dy[Width], gate[Width], up[Width];
    load(static_cast<const T*>(p.dy) + row * p.dy_stride + column, dy);
    load(static_cast<const T*>(p.gate) + row * p.gate_stride + column, gate);
    load(static_cast<const T*>(p.up) + row * p.up_stride + column, up);
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      const ValueAndSlope act = Act::both(gate[i]);
      gate[i] = dy[i] * up[i] * act.slope;
      up[i] = dy[i] * act.value;
    }
    store(static_cast<T*>(p.dgate) + row * p.d_stride + column, gate);
    store(static_cast<T*>(p.dup) + row * p.d_stride + column, up);
  }
}

template <class Params>
Grid grid(const Params& p, int width) {
  constexpr int64_t kMaxY = 65535;
  return {(p.dim + kThreads * width - 1) / (kThreads * width), p.rows < kMaxY ? p.rows : kMaxY};
}

template <class T, class Act>
Status run(const GluParams& p, const Device& device) {
  constexpr int W = kVector<T>;
  const bool vectors = vectors_fit<T>(p.gate, p.gate_stride, p.dim) && vectors_fit<T>(p.up, p.up_stride, p.dim) &&
                       vectors_fit<T>(p.y, p.dim, p.dim);
  if (vectors) return launch(forward<T, Act, W>, grid(p, W), kThreads, 0, device, p);
  return launch(forward<T, Act, 1>, grid(p, 1), kThreads, 0, device, p);
}

template <class T, class Act>
Status run(const GluBackwardParams& p, const Device& device) {
  constexpr int W = kVector<T>;
  const bool vectors = vectors_fit<T>(p.dy, p.dy_stride, p.dim) && vectors_fit<T>(p.gate, p.gate_stride, p.dim) &&
                       vectors_fit<T>(p.up, p.up_stride, p.dim) && vectors_fit<T>(p.dgate, p.d_stride, p.dim) &&
                       vectors_fit<T>(p.dup, p.d_stride, p.dim);
  if (vectors) return launch(backward<T, Act, W>, grid(p, W), kThreads, 0, device, p);
  return launch(backward<T, Act, 1>, grid(p, 1), kThreads, 0, device, p);
}

template <class T, class Params>
Status with_activation(const Params& p, const Device& device) {
  switch (p.activation) {
    case Activation::silu: return run<T, Silu>(p, device);
    case Activation::gelu_tanh: return run<T, GeluTanh>(p, device);
    case Activation::gelu_erf: return run<T, GeluErf>(p, device);
  }
  return "unknown activation";
}

}  // namespace

Status glu_forward(const GluParams& p, const Device& device) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, return (with_activation<T>(p, device)))
  return "unknown dtype";
}

Status glu_backward(const GluBackwardParams& p, const Device& device) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, return (with_activation<T>(p, device)))
  return "unknown dtype";
}

}  // namespace cuda
}  // namespace llmcore
