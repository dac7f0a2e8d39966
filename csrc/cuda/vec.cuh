// Elements 16 bytes at a time, as memory holds them and as floats.
#pragma once
#include "ptx.cuh"

namespace llmcore {
namespace cuda {

PTX_DEVICE float to_float(float x) { return x; }
PTX_DEVICE float to_float(bf16 x) { return ptx::from_bits(static_cast<uint32_t>(x.bits) << 16); }
PTX_DEVICE float to_float(f16 x) { return ptx::f16_to_float(x.bits); }
PTX_DEVICE float to_float(int8_t x) { return static_cast<float>(x); }
PTX_DEVICE float to_float(f8 x) {
  const uint32_t magnitude = x.bits & 0x7fu, sign = (x.bits & 0x80u) << 24;
  // The fields of the exponent and the fraction, put where a float has them, are the number times 2^(7 - 127).
  return magnitude == 0x7fu ? ptx::from_bits(0x7fc00000u) : ptx::from_bits(sign | magnitude << 20) * 0x1p120f;
}
// The f8 nearest to x, ties to even; |x| <= 448.
PTX_DEVICE uint32_t f8_bits(float x) {
  const float magnitude = fabsf(x);
  const uint32_t bits = ptx::bits(magnitude);
  const uint32_t normal = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
  const uint32_t subnormal = ptx::bits(magnitude + 16384.f) - 0x46800000u;  // the last bit of 2^14 is worth 2^-9
  return (magnitude < 0x1p-6f ? subnormal : normal) | (ptx::bits(x) >> 24 & 0x80u);
}

// Two floats as 16-bit elements of type T, `low` at the lower address.
PTX_DEVICE uint32_t pack2(bf16, float low, float high) { return ptx::pack_bf16(low, high); }
PTX_DEVICE uint32_t pack2(f16, float low, float high) { return ptx::pack_f16(low, high); }

template <class T>
PTX_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return T{static_cast<uint16_t>(pack2(T{}, x, 0.f))};
}

// x as an element of T would hold it.
template <class T>
PTX_DEVICE float rounded_to(float x) {
  return to_float(from_float<T>(x));
}

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements in 16 bytes

// Width elements as memory holds them: a multiple of 16 bytes, accessed 16 at a time, or a single element. In registers
// they take half the room of floats when T has 16 bits, and nothing waits for a load until they are unpacked.
template <class T, int Width>
struct Packed {
  static_assert(Width % kVector<T> == 0);
  ptx::Vec16 vectors[Width / kVector<T>];
};
template <class T>
struct Packed<T, 1> {
  T element;
};

// For data that is read once, around L1.
template <int Width, class T>
PTX_DEVICE Packed<T, Width> fetch(const T* p) {
  if constexpr (Width == 1) {
    return {*p};
  } else {
    Packed<T, Width> x;
#pragma unroll
    for (int i = 0; i < Width / kVector<T>; ++i) x.vectors[i] = ptx::load_global_16(p + i * kVector<T>);
    return x;
  }
}

// For data that many threads read: through L1. Cheaper to fetch again than to keep in registers.
template <int Width, class T>
PTX_DEVICE Packed<T, Width> fetch_cached(const T* p) {
  if constexpr (Width == 1) {
    return {*p};
  } else {
    Packed<T, Width> x;
#pragma unroll
    for (int i = 0; i < Width / kVector<T>; ++i) x.vectors[i] = ptx::load_cached_16(p + i * kVector<T>);
    return x;
  }
}

template <class T, int Width>
PTX_DEVICE void put(T* p, const Packed<T, Width>& x) {
  if constexpr (Width == 1) {
    *p = x.element;
  } else {
#pragma unroll
    for (int i = 0; i < Width / kVector<T>; ++i) ptx::store_global_16(p + i * kVector<T>, x.vectors[i]);
  }
}

template <class T, int Width>
PTX_DEVICE void unpack(const Packed<T, Width>& packed, float (&x)[Width]) {
  if constexpr (Width == 1) {
    x[0] = to_float(packed.element);
  } else {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      const int at = i % kVector<T>;
      const ptx::Vec16& v = packed.vectors[i / kVector<T>];
      if constexpr (sizeof(T) == 4)
        x[i] = ptx::from_bits(v.x[at]);
      else
        x[i] = to_float(T{static_cast<uint16_t>(v.x[at / 2] >> 16 * (at % 2))});
    }
  }
}

template <class T, int Width>
PTX_DEVICE Packed<T, Width> pack(const float (&x)[Width]) {
  if constexpr (Width == 1) {
    return {from_float<T>(x[0])};
  } else {
    Packed<T, Width> packed;
    constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
    for (int i = 0; i < Width; i += kPerWord) {
      uint32_t& word = packed.vectors[i / kVector<T>].x[i % kVector<T> / kPerWord];
      if constexpr (sizeof(T) == 4)
        word = ptx::bits(x[i]);
      else
        word = pack2(T{}, x[i], x[i + 1]);
    }
    return packed;
  }
}

template <class T, int Width>
PTX_DEVICE void load(const T* p, float (&x)[Width]) {
  unpack(fetch<Width>(p), x);
}
template <class T, int Width>
PTX_DEVICE void load_cached(const T* p, float (&x)[Width]) {
  unpack(fetch_cached<Width>(p), x);
}
template <class T, int Width>
PTX_DEVICE void store(T* p, const float (&x)[Width]) {
  put(p, pack<T>(x));
}

// Whether every row of (rows, dim) elements at p, `stride` apart, can be read 16 bytes at a time. Null pointers can.
template <class T>
inline bool vectors_fit(const void* p, int64_t stride, int64_t dim) {
  constexpr int64_t kWidth = kVector<T>;
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && (p == nullptr || (stride % kWidth == 0 && dim % kWidth == 0));
}

}  // namespace cuda
}  // namespace llmcore
