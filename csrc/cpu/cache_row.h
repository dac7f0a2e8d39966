// One token's head on its way into a cache.
#pragma once
#include "llmcore/kv_cache_write.h"
#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

template <class T, class C>
LLMCORE_INLINE void convert_row(const T* x, C* y, int64_t dim) {
  for_row(dim, [&](int64_t i, auto n) { store_n(y + i, load_n(x + i, n), n); });
}
template <class T>
LLMCORE_INLINE void convert_row(const T* x, T* y, int64_t dim) {
  __builtin_memcpy(y, x, dim * sizeof(T));
}

// Quotients to elements of 8 bits, rounded to nearest even. Below a subnormal scale, which is coarse, they may pass the
// largest element.
LLMCORE_INLINE void store_quotients(int8_t* q, vf x, int64_t n) {
  x = min(max(x, set1(-kLargestI8)), set1(kLargestI8));
  x = (x + kRoundMagic) - kRoundMagic;
  const vb bytes = __builtin_convertvector(__builtin_convertvector(x, vi), vb);
  __builtin_memcpy(q, &bytes, n);
}
LLMCORE_INLINE void store_quotients(f8* q, vf x, int64_t n) { store_n(q, x, n); }

LLMCORE_INLINE float largest_element(int8_t) { return kLargestI8; }
LLMCORE_INLINE float largest_element(f8) { return kLargestF8; }

// Returns the scale.
template <class T, class C>
LLMCORE_INLINE float quantise_row(const T* x, C* q, int64_t dim) {
  vf largest = zero(), poison = zero();
  for_row(dim, [&](int64_t i, auto n) {
    const vf v = load_n(x + i, n);
    largest = max(abs(v), largest);
    poison += v * 0.f;  // NaN from inf and NaN
  });
  const float scale = reduce_max(largest) / largest_element(C{});
  const bool finite = reduce_sum(poison) == 0.f;
  if (!finite || scale == 0.f) {
    __builtin_memset(q, 0, dim);
    return finite ? 0.f : __builtin_nanf("");
  }
  for_row(dim, [&](int64_t i, auto n) { store_quotients(q + i, load_n(x + i, n) / scale, n); });
  return scale;
}

// Row x of `side` goes to a block, an offset in it and a head.
template <class T>
LLMCORE_INLINE void write_row(const CacheSide& side, DType cache_dtype, const T* x, int64_t block, int64_t offset,
                              int64_t head) {
  const int64_t at = block * side.cache_strides[0] + offset * side.cache_strides[1] + head * side.cache_strides[2];
  if (has_scales(cache_dtype)) {
    side.scale[block * side.scale_strides[0] + offset * side.scale_strides[1] + head * side.scale_strides[2]] =
        cache_dtype == DType::i8 ? quantise_row(x, static_cast<int8_t*>(side.cache) + at, side.head_dim)
                                 : quantise_row(x, static_cast<f8*>(side.cache) + at, side.head_dim);
    return;
  }
  LLMCORE_DISPATCH_FLOAT(cache_dtype, C, convert_row(x, static_cast<C*>(side.cache) + at, side.head_dim))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
