// Element types as the kernels see them. Torch-free.
#pragma once
#include <cstdint>

namespace llmcore {

// 16-bit floats are carried as bits; the SIMD layer (csrc/cpu/simd) and ptx.cuh give them arithmetic.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// torch's float8_e4m3fn: sign, 4 bits of exponent, 3 of fraction; steps of 2^-9 below 2^-6, up to 448. There is no
// infinity; 0x7f and 0xff are NaN.
struct f8 {
  uint8_t bits;
};

enum class DType : int { f32, bf16, f16, i8, f8 };

constexpr const char* name(DType t) {
  switch (t) {
    case DType::f32: return "float32";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::i8: return "int8";
    case DType::f8: return "float8_e4m3fn";
  }
  return "?";
}

// Elements of 8 bits stand for element * scale.
constexpr bool has_scales(DType t) { return t == DType::i8 || t == DType::f8; }
constexpr float kLargestI8 = 127.f, kLargestF8 = 448.f;

}  // namespace llmcore

// LLMCORE_DISPATCH_FLOAT(p.dtype, T, kernel<T>(p, par)): T is the element type. The bindings admit no other dtype.
// A macro, so that the instantiated code stays inside the caller's instruction-set namespace.
#define LLMCORE_DISPATCH_FLOAT(dtype, T, ...) \
  switch (dtype) {                            \
    case ::llmcore::DType::f32: {             \
      using T = float;                        \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
    case ::llmcore::DType::bf16: {            \
      using T = ::llmcore::bf16;              \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
    case ::llmcore::DType::f16: {             \
      using T = ::llmcore::f16;               \
      __VA_ARGS__;                            \
      break;                                  \
    }                                         \
    default: break;                           \
  }
