// The L2 norm of a list of tensors. Bound by memory: every element is read once. A CTA sums one tile, and one CTA the
// tiles' sums, always in the same order.
#include "llmcore/global_norm.h"

#include "reduce.cuh"
#include "tensor_list.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFinishThreads = 1024;  // a CTA alone on the device
constexpr int kInFlight = 4;          // loads of a thread before it waits for the first

// In float32 over the elements of one access, which are few.
template <class T, int Width>
PTX_DEVICE double sum_of_squares(const Packed<T, Width>& packed) {
  float x[Width], sum = 0.f;
  unpack(packed, x);
#pragma unroll
  for (int i = 0; i < Width; ++i) sum += x[i] * x[i];
  return static_cast<double>(sum);
}

// This thread's part of [0, size) at x.
template <class T, int Width>
PTX_DEVICE double thread_sum(const T* x, int size) {
  constexpr int kStride = kThreads * Width;
  double sum = 0;
  int i = static_cast<int>(threadIdx.x) * Width;
  for (; i + (kInFlight - 1) * kStride < size; i += kInFlight * kStride) {
    Packed<T, Width> packed[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) packed[j] = fetch<Width>(x + i + j * kStride);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) sum += sum_of_squares(packed[j]);
  }
  for (; i < size; i += kStride) sum += sum_of_squares(fetch<Width>(x + i));
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    partial_sums(const __grid_constant__ TensorPart<NormTensor> part, double* partials) {
  PTX_SHARED_MEMORY(shared);
  const int64_t tile = part.tensors[0].first_tile + blockIdx.x;
  const NormTensor& tensor = part.tensors[tensor_of(part, tile)];
  const int64_t first = (tile - tensor.first_tile) * kNormTile, left = tensor.size - first;
  const int size = static_cast<int>(left < kNormTile ? left : kNormTile);
  const T* x = static_cast<const T*>(tensor.data) + first;
  const int vectors = at_16_bytes(tensor.data) ? size / kVector<T> * kVector<T> : 0;
  const double sum = thread_sum<T, kVector<T>>(x, vectors) + thread_sum<T, 1>(x + vectors, size - vectors);
  const double total = block_sum<kThreads>(sum, reinterpret_cast<double*>(shared));
  if (threadIdx.x == 0) partials[tile] = total;
}

__global__ void __launch_bounds__(kFinishThreads) finish(const double* partials, int64_t tiles, float* norm) {
  PTX_SHARED_MEMORY(shared);
  double sum = 0;
#pragma unroll 4
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kFinishThreads) sum += partials[tile];
  sum = block_sum<kFinishThreads>(sum, reinterpret_cast<double*>(shared));
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

template <class T>
Status run(const GlobalNormParams& p, const Device& device) {
  const auto sums = [&](const TensorPart<NormTensor>& part, int64_t tiles) {
    return launch(partial_sums<T>, {tiles}, kThreads, kThreads * sizeof(double), device, part, p.partials);
  };
  if (Status error = for_parts(p.tensors, p.count, p.tiles, sums)) return error;
  return launch(finish, {1}, kFinishThreads, kFinishThreads * sizeof(double), device, p.partials, p.tiles, p.norm);
}

}  // namespace

Status global_norm(const GlobalNormParams& p, const Device& device) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, return run<T>(p, device))
  return "unknown dtype";
}

}  // namespace cuda
}  // namespace llmcore
