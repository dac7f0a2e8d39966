#include "llmcore/rope.h"

#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

// Every pair is loaded before it is stored, so y may be x.
template <class T>
LLMCORE_INLINE void rotate_halves(const T* x, T* y, const float* cos, const float* sin, int64_t half, float sign) {
  for_row(half, [&](int64_t i, auto n) {
    const vf a = load_n(x + i, n), b = load_n(x + half + i, n);
    const vf c = load_n(cos + i, n), s = load_n(sin + i, n) * sign;
    store_n(y + i, a * c - b * s, n);
    store_n(y + half + i, b * c + a * s, n);
  });
}

template <class T>
LLMCORE_INLINE void rotate_pairs(const T* x, T* y, const float* cos, const float* sin, int64_t half, float sign) {
  vf signs = set1(sign);
  for (int i = 0; i < kLanes; i += 2) signs[i] = -sign;
  for_row(half, [&](int64_t i, auto n) {
    const vf c = load_n(cos + i, n), s = load_n(sin + i, n);
    const int64_t elements = 2 * static_cast<int64_t>(n);  // in two vectors
    const int64_t low = elements < kLanes ? elements : kLanes, high = elements - low;
    const vf a = load_n(x + 2 * i, low);
    store_n(y + 2 * i, a * repeat_low(c) + swap_pairs(a) * (repeat_low(s) * signs), low);
    if (high > 0) {
      const vf b = load_n(x + 2 * i + kLanes, high);
      store_n(y + 2 * i + kLanes, b * repeat_high(c) + swap_pairs(b) * (repeat_high(s) * signs), high);
    }
  });
}

template <class T>
void rotate(const RopeParams& p, const Parallel& par) {
  const int64_t half = p.rotary_dim / 2;
  const float sign = p.inverse ? -1.f : 1.f;
  parallel_ranges(par, p.batch * p.seq, row_grain(p.heads * p.head_dim), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / p.seq, t = token % p.seq;
      const int64_t position = p.positions ? p.positions[token] : t;
      const float* cos = p.cos + position * half;
      const float* sin = p.sin + position * half;
      for (int64_t h = 0; h < p.heads; ++h) {
        const T* x = static_cast<const T*>(p.x) + b * p.x_strides[0] + t * p.x_strides[1] + h * p.x_strides[2];
        T* y = static_cast<T*>(p.y) + b * p.y_strides[0] + t * p.y_strides[1] + h * p.y_strides[2];
        if (p.interleaved)
          rotate_pairs(x, y, cos, sin, half, sign);
        else
          rotate_halves(x, y, cos, sin, half, sign);
        if (x != y) __builtin_memcpy(y + p.rotary_dim, x + p.rotary_dim, (p.head_dim - p.rotary_dim) * sizeof(T));
      }
    }
  });
}

}  // namespace

void rope(const RopeParams& p, const Parallel& par) {
  if (p.heads == 0 || p.head_dim == 0) return;
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, rotate<T>(p, par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
