// RMS and layer normalisation. Bound by memory: forward 2 elements move per result (4 with a residual), backward 3 (4).
// A team of threads shares a row and keeps it in registers, so that statistics and result cost one read.
#include "llmcore/norm.h"

#include "launch.cuh"
#include "llmcore/parallel.h"
#include "reduce.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kForwardThreads = 256;
// A block of kSumRows rows is one CTA's work, and there may be fewer blocks than multiprocessors: large CTAs.
constexpr int kBackwardThreads = 512;
// Elements that a thread keeps of each operand: two times 16 bytes of 16-bit elements, and as many registers' worth of
// others, of which each takes one (and where they are read one by one, an address). Backward keeps the sums of its
// columns besides.
template <int Width>
constexpr int kHeld = Width == 8 ? 16 : 8;

template <class T, int Width>
PTX_DEVICE Packed<T, Width> sum(const Packed<T, Width>& a, const Packed<T, Width>& b) {
  float x[Width], y[Width];
  unpack(a, x);
  unpack(b, y);
#pragma unroll
  for (int i = 0; i < Width; ++i) x[i] += y[i];
  return pack<T>(x);
}

// Centred: layer normalisation. Not: RMS normalisation, whose mean stays 0 and which has no bias.
template <class T, bool Centred, int Width, int Size, int Held>
__global__ void __launch_bounds__(kForwardThreads, 2) forward(NormParams p) {
  using Mine = Team<Size, Width, Held>;
  using Chunk = Packed<T, Width>;
  constexpr int64_t kTeams = kForwardThreads / Size;
  PTX_SHARED_MEMORY(shared);
  TeamSum<kForwardThreads, Size, 1> over_team(shared);
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  const float dim = static_cast<float>(p.dim);  // a rounded 1 / dim would pull every row's mean the same way

  for (int64_t first = blockIdx.x * kTeams; first < p.rows; first += gridDim.x * kTeams) {
    const int64_t row = first + threadIdx.x / Size;
    const int64_t n = row < p.rows ? p.dim : 0;  // without a row, the team still takes part in its warp's shuffles
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* y = static_cast<T*>(p.y) + row * p.dim;
    Chunk z[Mine::kChunks] = {};
    Mine::held(n, [&](int j, int64_t column) { z[j] = fetch<Width>(x + column); });
    if (p.residual) {
      const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
      T* out = static_cast<T*>(p.z) + row * p.dim;
      Chunk r[Mine::kChunks] = {};  // all loads before the first store, which waits for them
      Mine::held(n, [&](int j, int64_t column) { r[j] = fetch<Width>(residual + column); });
      Mine::held(n, [&](int j, int64_t column) {
        z[j] = sum(z[j], r[j]);  // what the next layer will see: rounded to the dtype
        put(out + column, z[j]);
      });
      Mine::rest(n, [&](int64_t column) {
        put(out + column, sum(fetch<Width>(x + column), fetch<Width>(residual + column)));
      });
      x = out;
    }
    const auto for_row = [&](const auto& f) {  // f(column, chunk)
      Mine::held(n, [&](int j, int64_t column) { f(column, z[j]); });
      Mine::rest(n, [&](int64_t column) { f(column, fetch<Width>(x + column)); });
    };

    float total[1] = {0.f};  // of the elements, or of their squares
    for_row([&](int64_t, const Chunk& chunk) {
      float v[Width];
      unpack(chunk, v);
#pragma unroll
      for (int i = 0; i < Width; ++i) total[0] += Centred ? v[i] : v[i] * v[i];
    });
    over_team(total);
    float mean = 0.f;
    if constexpr (Centred) {
      mean = total[0] / dim;
      total[0] = 0.f;
      for_row([&](int64_t, const Chunk& chunk) {  // E[x^2] - mean^2 would cancel when the mean is large
        float v[Width];
        unpack(chunk, v);
#pragma unroll
        for (int i = 0; i < Width; ++i) total[0] += (v[i] - mean) * (v[i] - mean);
      });
      over_team(total);
    }
    const float rstd = 1.f / sqrtf(total[0] / dim + p.eps);
    if (threadIdx.x % Size == 0 && n > 0) {
      if constexpr (Centred) p.mean[row] = mean;
      p.rstd[row] = rstd;
    }
    for_row([&](int64_t column, const Chunk& chunk) {
      float v[Width], w[Width], b[Width] = {};
      unpack(chunk, v);
      load_cached(weight + column, w);
      if (Centred && bias) load_cached(bias + column, b);
#pragma unroll
      for (int i = 0; i < Width; ++i) v[i] = (v[i] - mean) * rstd * w[i] + b[i];
      store(y + column, v);
    });
  }
}

// With xhat = (z - mean) * rstd and g = dy * weight: dz = rstd * (g - mean(g) - xhat * mean(g * xhat)), without mean(g)
// when not centred; dweight = sum_rows dy * xhat; dbias = sum_rows dy. The teams of a CTA share a block of kSumRows
// rows; each sums the columns it holds over its rows, then the CTA over its teams.
template <class T, bool Centred, int Width, int Size>
__global__ void __launch_bounds__(kBackwardThreads, 1) backward(NormBackwardParams p) {
  using Mine = Team<Size, Width, kHeld<Width>>;
  using Chunk = Packed<T, Width>;
  using Columns = ColumnSums<kBackwardThreads, Size, Width, kHeld<Width>>;
  constexpr int kTeams = kBackwardThreads / Size;
  static_assert(kSumRows % kTeams == 0);
  PTX_SHARED_MEMORY(shared);
  TeamSum<kBackwardThreads, Size, Centred ? 2 : 1> over_team(shared + Columns::kBytes);
  const T* weight = static_cast<const T*>(p.weight);
  const float dim = static_cast<float>(p.dim);

  for (int64_t block = blockIdx.x; block * kSumRows < p.rows; block += gridDim.x) {
    float of_weight[Mine::kChunks][Width] = {}, of_bias[Mine::kChunks][Width] = {};
    float* dweight = p.dweight_partial + block * p.dim;
    float* dbias = p.dbias_partial ? p.dbias_partial + block * p.dim : nullptr;
    for (int64_t first = block * kSumRows; first < (block + 1) * kSumRows && first < p.rows; first += kTeams) {
      const int64_t row = first + threadIdx.x / Size;
      const int64_t n = row < p.rows ? p.dim : 0;
      const T* row_dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
      const T* row_dz = static_cast<const T*>(p.dz) + row * p.dz_stride;
      const T* row_z = static_cast<const T*>(p.z) + row * p.z_stride;
      T* dx = static_cast<T*>(p.dx) + row * p.dim;
      const float mean = Centred && n > 0 ? p.mean[row] : 0.f, rstd = n > 0 ? p.rstd[row] : 0.f;
      Chunk dy[Mine::kChunks] = {}, z[Mine::kChunks] = {}, dz[Mine::kChunks] = {};
      Mine::held(n, [&](int j, int64_t column) { dy[j] = fetch<Width>(row_dy + column); });
      Mine::held(n, [&](int j, int64_t column) { z[j] = fetch<Width>(row_z + column); });
      if (p.dz) Mine::held(n, [&](int j, int64_t column) { dz[j] = fetch<Width>(row_dz + column); });

      float total[Centred ? 2 : 1] = {};  // of g * xhat, and of g
      const auto add = [&](int64_t column, const Chunk& dy_chunk, const Chunk& z_chunk) {
        float d[Width], v[Width], w[Width];
        unpack(dy_chunk, d);
        unpack(z_chunk, v);
        load_cached(weight + column, w);
#pragma unroll
        for (int i = 0; i < Width; ++i) {
          const float g = ptx::product(d[i], w[i]);
          total[0] += g * ((v[i] - mean) * rstd);
          if constexpr (Centred) total[1] += g;
        }
      };
      Mine::held(n, [&](int j, int64_t column) { add(column, dy[j], z[j]); });
      Mine::rest(n, [&](int64_t column) { add(column, fetch<Width>(row_dy + column), fetch<Width>(row_z + column)); });
      over_team(total);
      const float mean_dot = total[0] / dim;
      float mean_g = 0.f;
      if constexpr (Centred) mean_g = total[1] / dim;

      const auto finish = [&](int64_t column, const Chunk& dy_chunk, const Chunk& z_chunk, const Chunk& dz_chunk,
                              float(&sum_weight)[Width], float(&sum_bias)[Width]) {
        float d[Width], v[Width], w[Width], other[Width];
        unpack(dy_chunk, d);
        unpack(z_chunk, v);
        unpack(dz_chunk, other);
        load_cached(weight + column, w);
#pragma unroll
        for (int i = 0; i < Width; ++i) {
          const float xhat = (v[i] - mean) * rstd;
          const float g = ptx::product(d[i], w[i]);  // as in the sum: where all g are equal, g - mean(g) is 0
          sum_weight[i] += d[i] * xhat;
          if constexpr (Centred) sum_bias[i] += d[i];
          v[i] = rstd * (g - mean_g - xhat * mean_dot) + other[i];
        }
        store(dx + column, v);
      };
      Mine::held(n, [&](int j, int64_t column) { finish(column, dy[j], z[j], dz[j], of_weight[j], of_bias[j]); });
      Mine::rest(n, [&](int64_t column) {  // always this thread's columns: summed in place, from zero
        float sum_weight[Width], sum_bias[Width] = {};
        load(dweight + column, sum_weight);
        if (dbias) load(dbias + column, sum_bias);
        finish(column, fetch<Width>(row_dy + column), fetch<Width>(row_z + column),
               p.dz ? fetch<Width>(row_dz + column) : Chunk{}, sum_weight, sum_bias);
        store(dweight + column, sum_weight);
        if (dbias) store(dbias + column, sum_bias);
      });
    }
    Columns::write(of_weight, shared, dweight, p.dim);
    if (Centred && dbias) Columns::write(of_bias, shared, dbias, p.dim);
  }
}

// A multiprocessor runs a few CTAs at once; this many times as many even out who ends when. More rows: CTAs loop.
int64_t grid_size(int64_t work, const Device& device) {
  const int64_t most = 32 * static_cast<int64_t>(device.multiprocessors);
  return work < most ? work : most;
}

template <class T, bool Centred, int Width, int Size, int Held>
Status start(const NormParams& p, const Device& device) {
  constexpr int kTeams = kForwardThreads / Size, kBytes = TeamSum<kForwardThreads, Size, 1>::kBytes;
  return launch(forward<T, Centred, Width, Size, Held>, {grid_size((p.rows + kTeams - 1) / kTeams, device)},
                kForwardThreads, kBytes, device, p);
}

// The smallest team that holds the row. The largest holds 8192 elements (4096 in float32, or read one by one); what a
// longer row has beyond is read again.
template <class T, bool Centred, int Width>
Status with_team(const NormParams& p, const Device& device) {
  constexpr int kFew = kHeld<Width>, kMany = 2 * kFew;
  if (p.dim <= 16 * kFew) return start<T, Centred, Width, 16, kFew>(p, device);
  if (p.dim <= 32 * kMany) return start<T, Centred, Width, 32, kMany>(p, device);
  if (p.dim <= 256 * kFew) return start<T, Centred, Width, 256, kFew>(p, device);
  return start<T, Centred, Width, 256, kMany>(p, device);
}

template <class T, bool Centred, int Width, int Size>
Status start(const NormBackwardParams& p, const Device& device) {
  constexpr int kBytes = ColumnSums<kBackwardThreads, Size, Width, kHeld<Width>>::kBytes + TeamSum < kBackwardThreads,
                Size, Centred ? 2 : 1 > ::kBytes;
  return launch(backward<T, Centred, Width, Size>, {grid_size((p.rows + kSumRows - 1) / kSumRows, device)},
                kBackwardThreads, kBytes, device, p);
}

template <class T, bool Centred, int Width>
Status with_team(const NormBackwardParams& p, const Device& device) {
  if (p.dim <= 16 * kHeld<Width>) return start<T, Centred, Width, 16>(p, device);
  if (p.dim <= 128 * kHeld<Width>) return start<T, Centred, Width, 128>(p, device);
  return start<T, Centred, Width, 512>(p, device);
}

template <class T>
bool all_vectors_fit(const NormParams& p) {
  return vectors_fit<T>(p.x, p.x_stride, p.dim) && vectors_fit<T>(p.residual, p.residual_stride, p.dim) &&
         vectors_fit<T>(p.weight, p.dim, p.dim) && vectors_fit<T>(p.bias, p.dim, p.dim) &&
         vectors_fit<T>(p.y, p.dim, p.dim) && vectors_fit<T>(p.z, p.dim, p.dim);
}
template <class T>
bool all_vectors_fit(const NormBackwardParams& p) {
  return vectors_fit<T>(p.dy, p.dy_stride, p.dim) && vectors_fit<T>(p.dz, p.dz_stride, p.dim) &&
         vectors_fit<T>(p.z, p.z_stride, p.dim) && vectors_fit<T>(p.weight, p.dim, p.dim) &&
         vectors_fit<T>(p.dx, p.dim, p.dim) && vectors_fit<float>(p.dweight_partial, p.dim, p.dim) &&
         vectors_fit<float>(p.dbias_partial, p.dim, p.dim);
}

template <bool Centred, class Params>
Status run(const Params& p, const Device& device) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T,
                         return (all_vectors_fit<T>(p) ? with_team<T, Centred, kVector<T>>(p, device)
                                                       : with_team<T, Centred, 1>(p, device)))
  return "unknown dtype";
}

}  // namespace

Status rms_norm_forward(const NormParams& p, const Device& device) { return run<false>(p, device); }
Status layer_norm_forward(const NormParams& p, const Device& device) { return run<true>(p, device); }
Status rms_norm_backward(const NormBackwardParams& p, const Device& device) { return run<false>(p, device); }
Status layer_norm_backward(const NormBackwardParams& p, const Device& device) { return run<true>(p, device); }

}  // namespace cuda
}  // namespace llmcore
