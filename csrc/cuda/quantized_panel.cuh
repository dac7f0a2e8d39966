// Panels of packed quantised weights (llmcore/reference/quantized.py): where a row's scales lie.
#pragma once
#include "llmcore/quantized_linear.h"
#include "vec.cuh"

namespace llmcore {
namespace cuda {

constexpr int kPanel = static_cast<int>(kQuantPanel), kBlock = static_cast<int>(kQuantBlock);

template <QuantFormat Which>
struct Quant : QuantFacts<Which> {
  static constexpr QuantFormat kFormat = Which;
};

// The float16 at byte `at` of a panel.
PTX_DEVICE float half_at(const uint8_t* panel, int64_t at) {
  return ptx::f16_to_float(*reinterpret_cast<const uint16_t*>(panel + at));
}

// Of row r of a panel, in block b.
struct Scales {
  float scale[2], addend;  // the second scale: of weights 16 ... 31
};
template <class F>
PTX_DEVICE Scales scales_of(const uint8_t* panel, int64_t b, int r) {
  const int64_t halves = F::kNested ? b / 8 * F::kNestedBytes : b * F::kScaleBytes;
  Scales s = {};
  s.scale[0] = half_at(panel, halves + 2 * r);
  if constexpr (F::kHasMin) s.addend = half_at(panel, halves + 32 + 2 * r);
  s.scale[1] = s.scale[0];
  if constexpr (F::kNested) {
    const int8_t* bytes = reinterpret_cast<const int8_t*>(panel + halves + F::kScaleBytes + b % 8 * 32 + r);
    if constexpr (F::kHasMin) s.addend *= -static_cast<float>(bytes[16]);
    s.scale[1] *= static_cast<float>(bytes[F::kHalves ? 16 : 0]);
    s.scale[0] *= static_cast<float>(bytes[0]);
  }
  return s;
}

}  // namespace cuda
}  // namespace llmcore
