// Dynamic tanh. Element-wise, and bound by memory: 2 elements move per result forward, 3 backward; the sums of the
// backward pass stay in registers until a block of rows is done.
#include "llmcore/dyt.h"

#include "launch.cuh"
#include "llmcore/parallel.h"
#include "reduce.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kForwardThreads = 256;
// A block of kSumRows rows is one CTA's work, and there may be fewer blocks than multiprocessors: large CTAs.
constexpr int kBackwardThreads = 512;

struct ValueAndSlope {
  float value, slope;
};

// tanh, relative error below 4e-7, and its derivative: near zero by an odd polynomial (Cephes); beyond, with
// q = 1 - tanh|x|, the derivative is q (2 - q), where 1 - tanh^2 would cancel.
PTX_DEVICE ValueAndSlope tanh_and_slope(float x) {
  const float e = ptx::exp2(fabsf(x) * (-2.f * 1.4426950408889634f)), q = 2.f * e * ptx::reciprocal(1.f + e);
  const float z = x * x;
  float near = -5.70498872745e-3f * z + 2.06390887954e-2f;
  near = near * z - 5.37397155531e-2f;
  near = near * z + 1.33314422036e-1f;
  near = near * z - 3.33332819422e-1f;
  near = near * z * x + x;
  if (fabsf(x) < 0.625f) return {near, 1.f - near * near};
  return {copysignf(1.f - q, x), q * (2.f - q)};
}

template <class T>
PTX_DEVICE float tanh_for(float x) {
  if constexpr (sizeof(T) == 4)
    return tanh_and_slope(x).value;
  else
    return ptx::tanh_approx(x);
}

// A row is shared by `lanes` (a power of two) threads of a CTA; the grid's x covers what more there is of it. Each
// thread keeps its columns' weight and bias and goes through rows, in strides of what the grid's y holds.
template <class T, int Width>
__global__ void __launch_bounds__(kForwardThreads) forward(DytParams p, int lanes) {
  const int thread = static_cast<int>(threadIdx.x), rows = kForwardThreads / lanes;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * lanes + thread % lanes) * Width;
  if (column >= p.dim) return;
  const float alpha = to_float(*static_cast<const T*>(p.alpha));
  float weight[Width], bias[Width] = {};
  load_cached(static_cast<const T*>(p.weight) + column, weight);
  if (p.bias) load_cached(static_cast<const T*>(p.bias) + column, bias);
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * rows + thread / lanes; row < p.rows; row += gridDim.y * rows) {
    float x[Width];
    load(static_cast<const T*>(p.x) + row * p.x_stride + column, x);
#pragma unroll
    for (int i = 0; i < Width; ++i) x[i] = tanh_for<T>(alpha * x[i]) * weight[i] + bias[i];
    store(static_cast<T*>(p.y) + row * p.dim + column, x);
  }
}

// With t = tanh(alpha * x) and g = dy * weight * (1 - t^2): dx = alpha * g; dalpha = sum g * x;
// dweight = sum_rows dy * t; dbias = sum_rows dy. A CTA takes a block of kSumRows rows, some columns at a time; its
// teams of Size threads share the rows.
template <class T, int Width, int Size>
__global__ void __launch_bounds__(kBackwardThreads, 2) backward(DytBackwardParams p) {
  using Columns = ColumnSums<kBackwardThreads, Size, Width, Width>;
  constexpr int kTeams = kBackwardThreads / Size;
  PTX_SHARED_MEMORY(shared);
  const float alpha = to_float(*static_cast<const T*>(p.alpha));

  for (int64_t block = blockIdx.x; block * kSumRows < p.rows; block += gridDim.x) {
    const int64_t begin = block * kSumRows, end = begin + kSumRows < p.rows ? begin + kSumRows : p.rows;
    double dalpha = 0;
    for (int64_t first = 0; first < p.dim; first += Size * Width) {
      const int64_t column = first + threadIdx.x % Size * Width;
      float of_weight[1][Width] = {}, of_bias[1][Width] = {};
      if (column < p.dim) {
        float w[Width];
        load_cached(static_cast<const T*>(p.weight) + column, w);
        for (int64_t row = begin + threadIdx.x / Size; row < end; row += kTeams) {
          float d[Width], x[Width], row_dalpha = 0.f;
          load(static_cast<const T*>(p.dy) + row * p.dy_stride + column, d);
          load(static_cast<const T*>(p.x) + row * p.x_stride + column, x);
#pragma unroll
          for (int i = 0; i < Width; ++i) {
            const ValueAndSlope t = tanh_and_slope(alpha * x[i]);
            const float g = d[i] * w[i] * t.slope;
            row_dalpha += g * x[i];
            of_weight[0][i] += d[i] * t.value;
            of_bias[0][i] += d[i];
            x[i] = alpha * g;
          }
          store(static_cast<T*>(p.dx) + row * p.dim + column, x);
          dalpha += static_cast<double>(row_dalpha);
        }
      }
      const int64_t at = block * p.dim + first;
      Columns::write(of_weight, shared, p.dweight_partial + at, p.dim - first);
      if (p.dbias_partial) Columns::write(of_bias, shared, p.dbias_partial + at, p.dim - first);
    }
    dalpha = block_sum<kBackwardThreads>(dalpha, reinterpret_cast<double*>(shared));
    if (threadIdx.x == 0) p.dalpha_partial[block] = dalpha;
  }
}

template <class T, int Width>
Status start(const DytParams& p, const Device& device) {
  const int64_t chunks = (p.dim + Width - 1) / Width;
  int lanes = 1;
  while (lanes < kForwardThreads && lanes < chunks) lanes *= 2;
  const int64_t across = (chunks + lanes - 1) / lanes, rows = kForwardThreads / lanes;
  // Enough CTAs to fill the device and to even out who ends when; no more, so that weights are rarely read.
  const int64_t most = 16 * device.multiprocessors / across + 1, down = (p.rows + rows - 1) / rows;
  return launch(forward<T, Width>, {across, down < most ? down : most}, kForwardThreads, 0, device, p, lanes);
}

template <class T, int Width, int Size>
Status start(const DytBackwardParams& p, const Device& device) {
  constexpr int kSums = ColumnSums<kBackwardThreads, Size, Width, Width>::kBytes;
  constexpr int kDoubles = kBackwardThreads * static_cast<int>(sizeof(double));
  const int64_t blocks = (p.rows + kSumRows - 1) / kSumRows, most = 32 * static_cast<int64_t>(device.multiprocessors);
  return launch(backward<T, Width, Size>, {blocks < most ? blocks : most}, kBackwardThreads,
                kSums > kDoubles ? kSums : kDoubles, device, p);
}
template <class T, int Width>
Status start(const DytBackwardParams& p, const Device& device) {
  if (p.dim <= 16 * Width) return start<T, Width, 16>(p, device);
  return start<T, Width, 128>(p, device);
}

template <class T>
bool all_vectors_fit(const DytParams& p) {
  return vectors_fit<T>(p.x, p.x_stride, p.dim) && vectors_fit<T>(p.weight, p.dim, p.dim) &&
         vectors_fit<T>(p.bias, p.dim, p.dim) && vectors_fit<T>(p.y, p.dim, p.dim);
}
template <class T>
bool all_vectors_fit(const DytBackwardParams& p) {
  return vectors_fit<T>(p.dy, p.dy_stride, p.dim) && vectors_fit<T>(p.x, p.x_stride, p.dim) &&
         vectors_fit<T>(p.weight, p.dim, p.dim) && vectors_fit<T>(p.dx, p.dim, p.dim);
}

template <class Params>
Status run(const Params& p, const Device& device) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T,
                         return (all_vectors_fit<T>(p) ? start<T, kVector<T>>(p, device) : start<T, 1>(p, device)))
  return "unknown dtype";
}

}  // namespace

Status dyt_forward(const DytParams& p, const Device& device) { return run(p, device); }
Status dyt_backward(const DytBackwardParams& p, const Device& device) { return run(p, device); }

}  // namespace cuda
}  // namespace llmcore
