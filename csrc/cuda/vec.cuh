// 16 bytes of elements at a time, as floats.
#pragma once
#include "ptx.cuh"

namespace llmcore {
namespace cuda {

PTX_DEVICE float to_float(float x) { return x; }
PTX_DEVICE float to_float(bf16 x) { return ptx::from_bits(static_cast<uint32_t>(x.bits) << 16); }
PTX_DEVICE float to_float(f16 x) { return ptx::f16_to_float(x.bits); }
PTX_DEVICE float to_float(int8_t x) { return static_cast<float>(x); }

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

// Width elements from p on: one 16-byte access when Width elements are 16 bytes, else one by one.
template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T, int Width>
PTX_DEVICE void load(const T* p, float (&x)[Width]) {
  if constexpr (Width == kVector<T>) {
    const ptx::Vec16 v = ptx::load_global_16(p);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = ptx::from_bits(v.x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < Width; ++i) x[i] = to_float(T{static_cast<uint16_t>(v.x[i / 2] >> 16 * (i % 2))});
    }
  } else {
#pragma unroll
    for (int i = 0; i < Width; ++i) x[i] = to_float(p[i]);
  }
}

template <class T, int Width>
PTX_DEVICE void store(T* p, const float (&x)[Width]) {
  if constexpr (Width == kVector<T>) {
    ptx::Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if constexpr (sizeof(T) == 4)
        v.x[i] = ptx::bits(x[i]);
      else
        v.x[i] = pack2(T{}, x[2 * i], x[2 * i + 1]);
    ptx::store_global_16(p, v);
  } else {
#pragma unroll
    for (int i = 0; i < Width; ++i) p[i] = from_float<T>(x[i]);
  }
}

// Whether every row of (rows, dim) elements at p, `stride` apart, can be read 16 bytes at a time. Null pointers can.
template <class T>
inline bool vectors_fit(const void* p, int64_t stride, int64_t dim) {
  constexpr int64_t kWidth = kVector<T>;
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && (p == nullptr || (stride % kWidth == 0 && dim % kWidth == 0));
}

}  // namespace cuda
}  // namespace llmcore
