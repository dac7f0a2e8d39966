// The rotation of one head.
#pragma once
#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

// The angles of one token.
struct Rotation {
  const float *cos, *sin;  // (half)
  int64_t half;            // pairs; elements from 2 * half on are not rotated
  bool interleaved;
  float sign;  // -1 rotates by the negative angles
};

// Both load what they rotate before they store it, so a row may be rotated in place.
// load(i, n) gives elements [i, i + n), store(i, v, n) takes them.
template <class Load, class Store>
LLMCORE_INLINE void rotate_halves(const Rotation& r, const Load& load, const Store& store) {
  for_row(r.half, [&](int64_t i, auto n) {
    const vf a = load(i, n), b = load(r.half + i, n);
    const vf c = load_n(r.cos + i, n), s = load_n(r.sin + i, n) * r.sign;
    store(i, a * c - b * s, n);
    store(r.half + i, b * c + a * s, n);
  });
}

template <class Load, class Store>
LLMCORE_INLINE void rotate_pairs(const Rotation& r, const Load& load, const Store& store) {
  vf signs = set1(r.sign);
  for (int i = 0; i < kLanes; i += 2) signs[i] = -r.sign;
  for_row(r.half, [&](int64_t i, auto n) {
    const vf c = load_n(r.cos + i, n), s = load_n(r.sin + i, n);
    const int64_t elements = 2 * static_cast<int64_t>(n);  // in two vectors
    const int64_t low = elements < kLanes ? elements : kLanes, high = elements - low;
    const vf a = load(2 * i, low);
    store(2 * i, a * repeat_low(c) + swap_pairs(a) * (repeat_low(s) * signs), low);
    if (high > 0) {
      const vf b = load(2 * i + kLanes, high);
      store(2 * i + kLanes, b * repeat_high(c) + swap_pairs(b) * (repeat_high(s) * signs), high);
    }
  });
}

template <class Load, class Store>
LLMCORE_INLINE void rotate_row(const Rotation& r, const Load& load, const Store& store) {
  if (r.interleaved)
    rotate_pairs(r, load, store);
  else
    rotate_halves(r, load, store);
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
