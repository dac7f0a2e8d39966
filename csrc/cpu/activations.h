// The activations of gated linear units, with their slopes.
#pragma once
#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

struct ValueAndSlope {
  vf value, slope;
};

struct Silu {
  static LLMCORE_INLINE vf value(vf g) { return g / (1.f + exp(-g)); }
  static LLMCORE_INLINE ValueAndSlope both(vf g) {
    const vf s = sigmoid(g), value = g * s;
    return {value, s + value * (1.f - s)};
  }
};

// g/2 (1 + tanh(u)), u = sqrt(2/pi) (g + 0.044715 g^3) (Hendrycks & Gimpel, arXiv 1606.08415)
struct GeluTanh {
  static constexpr float kScale = 0.7978845608028654f, kCubic = 0.044715f;
  static LLMCORE_INLINE vf inner(vf g) { return kScale * g * fma(g * g, set1(kCubic), set1(1.f)); }
  static LLMCORE_INLINE vf value(vf g) { return 0.5f * g * (1.f + tanh(inner(g))); }
  static LLMCORE_INLINE ValueAndSlope both(vf g) {
    vf slope;
    const vf c = max(set1(-30.f), min(set1(30.f), g));  // saturated long before; 0 * g^3 must not become 0 * inf
    const vf half = 0.5f * (1.f + tanh_and_slope(inner(c), slope));
    const vf dinner = kScale * fma(c * c, set1(3.f * kCubic), set1(1.f));
    return {g * half, half + 0.5f * c * slope * dinner};
  }
};

// g/2 (1 + erf(g / sqrt(2)))
struct GeluErf {
  static LLMCORE_INLINE vf cdf(vf g) { return 0.5f * (1.f + erf(g * 0.7071067811865476f)); }
  static LLMCORE_INLINE vf value(vf g) { return g * cdf(g); }
  static LLMCORE_INLINE ValueAndSlope both(vf g) {
    const vf c = cdf(g), density = 0.3989422804014327f * exp(-0.5f * g * g);
    return {g * c, c + g * density};
  }
};

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
