// The activations of gated linear units, with their slopes.
#pragma once
#include "ptx.cuh"

namespace llmcore {
namespace cuda {

PTX_DEVICE float exp(float x) { return ptx::exp2(x * 1.4426950408889634f); }

struct ValueAndSlope {
  float value, slope;
};

struct Silu {
  PTX_DEVICE float value(float g) { return g / (1.f + exp(-g)); }
  PTX_DEVICE ValueAndSlope both(float g) {
    const float s = 1.f / (1.f + exp(-g)), value = g * s;
    return {value, s + value * (1.f - s)};
  }
};

// g/2 (1 + tanh(u)), u = sqrt(2/pi) (g + 0.044715 g^3) (Hendrycks & Gimpel, arXiv 1606.08415)
struct GeluTanh {
  static constexpr float kScale = 0.7978845608028654f, kCubic = 0.044715f;
  PTX_DEVICE float inner(float g) { return kScale * g * (1.f + kCubic * g * g); }
  PTX_DEVICE float value(float g) { return 0.5f * g * (1.f + tanhf(inner(g))); }
  PTX_DEVICE ValueAndSlope both(float g) {
    const float c = fminf(fmaxf(g, -30.f), 30.f);  // saturated long before; 0 * g^3 must not become 0 * inf
    // With q = 1 - tanh|u| the slope of tanh is q (2 - q): 1 - tanh^2 would cancel.
    const float u = inner(c), e = exp(-2.f * fabsf(u)), q = 2.f * e / (1.f + e);
    const float half = 0.5f * (1.f + copysignf(1.f - q, u)), dinner = kScale * (1.f + 3.f * kCubic * c * c);
    return {g * half, half + 0.5f * c * q * (2.f - q) * dinner};
  }
};

// g/2 (1 + erf(g / sqrt(2)))
struct GeluErf {
  PTX_DEVICE float cdf(float g) { return 0.5f * (1.f + erff(g * 0.7071067811865476f)); }
  PTX_DEVICE float value(float g) { return g * cdf(g); }
  PTX_DEVICE ValueAndSlope both(float g) {
    const float c = cdf(g), density = 0.3989422804014327f * exp(-0.5f * g * g);
    return {g * c, c + g * density};
  }
};

}  // namespace cuda
}  // namespace llmcore
