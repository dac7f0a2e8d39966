#include "llmcore/glu.h"

#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

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

template <class T, class Act>
void forward(const GluParams& p, const Parallel& par) {
  parallel_ranges(par, p.rows, row_grain(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* gate = static_cast<const T*>(p.gate) + r * p.gate_stride;
      const T* up = static_cast<const T*>(p.up) + r * p.up_stride;
      T* y = static_cast<T*>(p.y) + r * p.dim;
      for_row(p.dim,
              [&](int64_t i, auto n) { store_n(y + i, Act::value(load_n(gate + i, n)) * load_n(up + i, n), n); });
    }
  });
}

template <class T, class Act>
void backward(const GluBackwardParams& p, const Parallel& par) {
  parallel_ranges(par, p.rows, row_grain(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* dy = static_cast<const T*>(p.dy) + r * p.dy_stride;
      const T* gate = static_cast<const T*>(p.gate) + r * p.gate_stride;
      const T* up = static_cast<const T*>(p.up) + r * p.up_stride;
      T* dgate = static_cast<T*>(p.dgate) + r * p.dim;
      T* dup = static_cast<T*>(p.dup) + r * p.dim;
      for_row(p.dim, [&](int64_t i, auto n) {
        const vf d = load_n(dy + i, n);
        const ValueAndSlope act = Act::both(load_n(gate + i, n));
        store_n(dgate + i, d * load_n(up + i, n) * act.slope, n);
        store_n(dup + i, d * act.value, n);
      });
    }
  });
}

}  // namespace

void glu_forward(const GluParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(
      p.dtype, T, switch (p.activation) {
        case Activation::silu: return forward<T, Silu>(p, par);
        case Activation::gelu_tanh: return forward<T, GeluTanh>(p, par);
        case Activation::gelu_erf: return forward<T, GeluErf>(p, par);
      })
}

void glu_backward(const GluBackwardParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(
      p.dtype, T, switch (p.activation) {
        case Activation::silu: return backward<T, Silu>(p, par);
        case Activation::gelu_tanh: return backward<T, GeluTanh>(p, par);
        case Activation::gelu_erf: return backward<T, GeluErf>(p, par);
      })
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
