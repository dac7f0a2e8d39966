#include "llmcore/kv_cache_write.h"

#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

template <class T, class C>
LLMCORE_INLINE void convert_row(const T* x, C* y, int64_t dim) {
  for_row(dim, [&](int64_t i, auto n) { store_n(y + i, load_n(x + i, n), n); });
}
template <class T>
LLMCORE_INLINE void convert_row(const T* x, T* y, int64_t dim) {
  __builtin_memcpy(y, x, dim * sizeof(T));
}

// Returns the scale.
template <class T>
LLMCORE_INLINE float quantise_row(const T* x, int8_t* q, int64_t dim) {
  vf largest = zero(), poison = zero();
  for_row(dim, [&](int64_t i, auto n) {
    const vf v = load_n(x + i, n);
    largest = max(abs(v), largest);
    poison += v * 0.f;  // NaN from inf and NaN
  });
  const float scale = reduce_max(largest) / 127.f;
  const bool finite = reduce_sum(poison) == 0.f;
  if (!finite || scale == 0.f) {
    __builtin_memset(q, 0, dim);
    return finite ? 0.f : __builtin_nanf("");
  }
  for_row(dim, [&](int64_t i, auto n) {
    vf v = load_n(x + i, n) / scale;
    v = min(max(v, set1(-127.f)), set1(127.f));  // a subnormal scale is coarse: the quotient may pass 127
    v = (v + kRoundMagic) - kRoundMagic;
    const vb bytes = __builtin_convertvector(__builtin_convertvector(v, vi), vb);
    __builtin_memcpy(q + i, &bytes, static_cast<int64_t>(n));
  });
  return scale;
}

template <class T>
void write_row(const CacheSide& side, DType cache_dtype, int64_t token, int64_t block, int64_t offset, int64_t head) {
  const T* x = static_cast<const T*>(side.source) + token * side.source_strides[0] + head * side.source_strides[1];
  const int64_t at = block * side.cache_strides[0] + offset * side.cache_strides[1] + head * side.cache_strides[2];
  if (cache_dtype == DType::i8) {
    const float scale = quantise_row(x, static_cast<int8_t*>(side.cache) + at, side.head_dim);
    side.scale[block * side.scale_strides[0] + offset * side.scale_strides[1] + head * side.scale_strides[2]] = scale;
    return;
  }
  LLMCORE_DISPATCH_FLOAT(cache_dtype, C, convert_row(x, static_cast<C*>(side.cache) + at, side.head_dim))
}

template <class T>
void write(const KvCacheWriteParams& p, const Parallel& par) {
  const int64_t elements = p.kv_heads * (p.k.head_dim + p.v.head_dim);
  parallel_ranges(par, p.tokens, row_grain(elements > 0 ? elements : 1), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      if (p.slots[token] < 0) continue;
      const int64_t block = p.slots[token] / p.block_size, offset = p.slots[token] % p.block_size;
      for (int64_t head = 0; head < p.kv_heads; ++head) {
        if (p.k.head_dim > 0) write_row<T>(p.k, p.cache_dtype, token, block, offset, head);
        if (p.v.head_dim > 0) write_row<T>(p.v, p.cache_dtype, token, block, offset, head);
      }
    }
  });
}

}  // namespace

void kv_cache_write(const KvCacheWriteParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, write<T>(p, par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
