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

enum class DType : int { f32, bf16, f16, i8 };

constexpr const char* name(DType t) {
  return t == DType::f32 ? "float32" : t == DType::bf16 ? "bfloat16" : t == DType::f16 ? "float16" : "int8";
}

// Elements of 8 bits stand for element * scale.
constexpr bool has_scales(DType t) { return t == DType::i8; }

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
