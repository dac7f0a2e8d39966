// Rows of a mixture-of-experts layer to expert order and back. Bound by memory: a token's row is read once and written
// top_k times, or the other way round.
#include "llmcore/moe_permute.h"

#include "launch.cuh"
#include "reduce.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// A row is so many chunks of 16 bytes (or of one element), and a CTA takes so many tokens at once.
struct Items {
  unsigned chunks, tokens;
};

// f(token, column) for every chunk of every token.
template <int Width, class F>
PTX_DEVICE void for_chunks(int64_t tokens, const Items& items, const F& f) {
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * items.tokens; first < tokens;
       first += static_cast<int64_t>(gridDim.x) * items.tokens)
    for (unsigned i = threadIdx.x; i < items.chunks * items.tokens; i += kThreads) {
      const int64_t token = first + i / items.chunks;
      if (token >= tokens) break;
      f(token, static_cast<int64_t>(i % items.chunks) * Width);
    }
}

template <class T, int Width>
PTX_DEVICE Packed<T, Width> times(const Packed<T, Width>& chunk, float weight) {
  float x[Width];
  unpack(chunk, x);
#pragma unroll
  for (int i = 0; i < Width; ++i) x[i] *= weight;
  return pack<T>(x);
}

template <class T, int Width>
__global__ void __launch_bounds__(kThreads) scatter(MoeScatterParams p, Items items) {
  for_chunks<Width>(p.tokens, items, [&](int64_t token, int64_t column) {
    const auto x = fetch<Width>(static_cast<const T*>(p.x) + token * p.x_stride + column);
    for (int64_t a = token * p.top_k; a < (token + 1) * p.top_k; ++a)
      put(static_cast<T*>(p.sorted) + p.row_of[a] * p.dim + column, p.weights ? times(x, p.weights[a]) : x);
  });
}

// With dot products, which take whole rows: a warp for each assignment. Those of one token are neighbours and find its
// row in L1 or L2.
template <class T, int Width>
__global__ void __launch_bounds__(kThreads) scatter_with_dots(MoeScatterParams p) {
  constexpr int kChunks = Width == 1 ? 4 : 2;  // of each row, that are loaded before the first is used
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t a = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; a < p.tokens * p.top_k;
       a += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t row = p.row_of[a];
    const T* x = static_cast<const T*>(p.x) + a / p.top_k * p.x_stride;
    const T* y = static_cast<const T*>(p.y) + row * p.y_stride;
    T* sorted = static_cast<T*>(p.sorted) + row * p.dim;
    const float weight = p.weights ? p.weights[a] : 1.f;
    float dot = 0.f;
    for (int64_t first = lane * Width; first < p.dim; first += kChunks * 32 * Width) {
      Packed<T, Width> of_x[kChunks] = {}, of_y[kChunks] = {};
#pragma unroll
      for (int i = 0; i < kChunks; ++i)
        if (const int64_t column = first + int64_t{i * 32 * Width}; column < p.dim) {
          of_x[i] = fetch_cached<Width>(x + column);
          of_y[i] = fetch<Width>(y + column);
        }
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        float u[Width], v[Width];
        unpack(of_x[i], u);
        unpack(of_y[i], v);
#pragma unroll
        for (int k = 0; k < Width; ++k) dot += u[k] * v[k];
        if (const int64_t column = first + int64_t{i * 32 * Width}; column < p.dim)
          put(sorted + column, times(of_x[i], weight));
      }
    }
    dot = lanes_sum<32>(dot);
    if (lane == 0) p.dweights[a] = dot;
  }
}

template <class T, int Width>
__global__ void __launch_bounds__(kThreads) gather(MoeGatherParams p, Items items) {
  constexpr int kRows = 4;  // that are loaded before the first is added
  for_chunks<Width>(p.tokens, items, [&](int64_t token, int64_t column) {
    const int32_t* rows = p.row_of + token * p.top_k;
    const float* weights = p.weights ? p.weights + token * p.top_k : nullptr;
    float sum[Width] = {};
    for (int64_t first = 0; first < p.top_k; first += kRows) {
      Packed<T, Width> chunks[kRows] = {};
#pragma unroll
      for (int j = 0; j < kRows; ++j)
        if (first + j < p.top_k)
          chunks[j] = fetch<Width>(static_cast<const T*>(p.sorted) + rows[first + j] * p.sorted_stride + column);
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        if (first + j >= p.top_k) break;
        const float weight = weights ? weights[first + j] : 1.f;
        float x[Width];
        unpack(chunks[j], x);
#pragma unroll
        for (int i = 0; i < Width; ++i) sum[i] += x[i] * weight;
      }
    }
    store(static_cast<T*>(p.out) + token * p.dim + column, sum);
  });
}

// A multiprocessor runs up to 8 CTAs at once; several times as many even out who ends when.
int64_t grid_size(int64_t work, const Device& device) {
  const int64_t most = 32 * int64_t{device.multiprocessors};
  return work < most ? work : most;
}

template <class Params>
Status start_on_chunks(void (*kernel)(Params, Items), const Params& p, int64_t chunks, const Device& device) {
  if (chunks == 0) return nullptr;
  const int64_t tokens = chunks < kThreads ? (kThreads + chunks - 1) / chunks : 1;
  return launch(kernel, {grid_size((p.tokens + tokens - 1) / tokens, device)}, kThreads, 0, device, p,
                Items{static_cast<unsigned>(chunks), static_cast<unsigned>(tokens)});
}

template <class T, int Width>
Status start(const MoeScatterParams& p, const Device& device) {
  if (!p.y) return start_on_chunks(scatter<T, Width>, p, p.dim / Width, device);
  return launch(scatter_with_dots<T, Width>, {grid_size((p.tokens * p.top_k + kWarps - 1) / kWarps, device)}, kThreads,
                0, device, p);
}
template <class T, int Width>
Status start(const MoeGatherParams& p, const Device& device) {
  return start_on_chunks(gather<T, Width>, p, p.dim / Width, device);
}

template <class T>
bool all_vectors_fit(const MoeScatterParams& p) {
  return vectors_fit<T>(p.x, p.x_stride, p.dim) && vectors_fit<T>(p.y, p.y_stride, p.dim) &&
         vectors_fit<T>(p.sorted, p.dim, p.dim);
}
template <class T>
bool all_vectors_fit(const MoeGatherParams& p) {
  return vectors_fit<T>(p.sorted, p.sorted_stride, p.dim) && vectors_fit<T>(p.out, p.dim, p.dim);
}

template <class Params>
Status run(const Params& p, const Device& device) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T,
                         return (all_vectors_fit<T>(p) ? start<T, kVector<T>>(p, device) : start<T, 1>(p, device)))
  return "unknown dtype";
}

}  // namespace

Status moe_scatter(const MoeScatterParams& p, const Device& device) { return run(p, device); }
Status moe_gather(const MoeGatherParams& p, const Device& device) { return run(p, device); }

}  // namespace cuda
}  // namespace llmcore
