// Rotary position embedding. Element-wise in pairs, and bound by memory: an element is read and written once. Angles
// come from L1, where all heads of a token find them.
#include "llmcore/rope.h"

#include "launch.cuh"
#include "vec.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// How the work on one token is cut: each head is `rotated` items of Width pairs, then `copied` items of Width elements.
struct Items {
  int rotated, copied, tokens;  // tokens: how many a CTA takes at once
};

// Both pairings load the same two chunks of Width elements before they store, so y may be x. They are the first and the
// second of Width pairs, or (Interleaved) Width pairs side by side.
template <class T, int Width, bool Interleaved>
PTX_DEVICE void rotate(const T* x, T* y, const float* cos, const float* sin, int64_t half, int64_t pair, float sign) {
  const int64_t first = Interleaved ? 2 * pair : pair, second = Interleaved ? first + Width : pair + half;
  float both[2][Width], c[Width], s[Width];
  load(x + first, both[0]);
  load(x + second, both[1]);
  load_cached(cos + pair, c);
  load_cached(sin + pair, s);
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    float& a = Interleaved ? both[2 * i / Width][2 * i % Width] : both[0][i];
    float& b = Interleaved ? both[(2 * i + 1) / Width][(2 * i + 1) % Width] : both[1][i];
    const float rotated = a * c[i] - b * (sign * s[i]);
    b = b * c[i] + a * (sign * s[i]);
    a = rotated;
  }
  store(y + first, both[0]);
  store(y + second, both[1]);
}

// Positions within a CTA's tokens fit 32 bits; offsets and token numbers take 64.
template <class T, int Width, bool Interleaved>
__global__ void __launch_bounds__(kThreads) rotate_tokens(RopeParams p, Items items) {
  const int64_t half = p.rotary_dim / 2, tokens = p.batch * p.seq;
  const float sign = p.inverse ? -1.f : 1.f;
  const unsigned per_head = items.rotated + items.copied, per_token = per_head * static_cast<unsigned>(p.heads);
  const unsigned per_cta = per_token * items.tokens;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * items.tokens; first < tokens;
       first += static_cast<int64_t>(gridDim.x) * items.tokens) {
    for (unsigned i = threadIdx.x; i < per_cta; i += kThreads) {
      const int64_t token = first + i / per_token;
      if (token >= tokens) break;
      const unsigned head = i % per_token / per_head, item = i % per_head;
      const int64_t b = token / p.seq, t = token % p.seq;
      const T* x = static_cast<const T*>(p.x) + b * p.x_strides[0] + t * p.x_strides[1] + head * p.x_strides[2];
      T* y = static_cast<T*>(p.y) + b * p.y_strides[0] + t * p.y_strides[1] + head * p.y_strides[2];
      if (item < static_cast<unsigned>(items.rotated)) {
        const int64_t position = p.positions ? p.positions[token] : t;
        rotate<T, Width, Interleaved>(x, y, p.cos + position * half, p.sin + position * half, half,
                                      static_cast<int64_t>(item) * Width, sign);
      } else {
        const int64_t column = p.rotary_dim + static_cast<int64_t>(item - items.rotated) * Width;
        put(y + column, fetch<Width>(x + column));
      }
    }
  }
}

template <class T, int Width>
Status start(const RopeParams& p, const Device& device) {
  const int64_t tokens = p.batch * p.seq;
  Items items{static_cast<int>(p.rotary_dim / 2 / Width),
              p.x == p.y ? 0 : static_cast<int>((p.head_dim - p.rotary_dim) / Width), 1};
  const int64_t per_token = p.heads * (items.rotated + items.copied);
  if (per_token == 0) return nullptr;
  if (per_token < kThreads) items.tokens = static_cast<int>((kThreads + per_token - 1) / per_token);
  // A multiprocessor runs up to 8 CTAs at once; several times as many even out who ends when.
  const int64_t most = 32 * static_cast<int64_t>(device.multiprocessors);
  const int64_t ctas = (tokens + items.tokens - 1) / items.tokens;
  const auto kernel = p.interleaved ? rotate_tokens<T, Width, true> : rotate_tokens<T, Width, false>;
  return launch(kernel, {ctas < most ? ctas : most}, kThreads, 0, device, p, items);
}

// Whether every head starts at a multiple of 16 bytes.
template <class T>
bool heads_fit(const void* x, const int64_t (&strides)[3], int64_t head_dim) {
  return vectors_fit<T>(x, strides[0], head_dim) && strides[1] % kVector<T> == 0 && strides[2] % kVector<T> == 0;
}

template <class T>
Status run(const RopeParams& p, const Device& device) {
  constexpr int W = kVector<T>;
  const int64_t half = p.rotary_dim / 2;
  const bool vectors = heads_fit<T>(p.x, p.x_strides, p.head_dim) && heads_fit<T>(p.y, p.y_strides, p.head_dim) &&
                       half % W == 0 && vectors_fit<float>(p.cos, half, half) && vectors_fit<float>(p.sin, half, half);
  return vectors ? start<T, W>(p, device) : start<T, 1>(p, device);
}

}  // namespace

Status rope(const RopeParams& p, const Device& device) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, return (run<T>(p, device)))
  return "unknown dtype";
}

}  // namespace cuda
}  // namespace llmcore
