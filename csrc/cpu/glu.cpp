#include "llmcore/glu.h"

#include "activations.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

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
      T* dgate = static_cast<T*>(p.dgate) + r * p.d_stride;
      T* dup = static_cast<T*>(p.dup) + r * p.d_stride;
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
