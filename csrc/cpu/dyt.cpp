#include "llmcore/dyt.h"

#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

template <class T>
void forward(const DytParams& p, const Parallel& par) {
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  const float alpha = to_float(*static_cast<const T*>(p.alpha));
  parallel_ranges(par, p.rows, row_grain(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(p.x) + r * p.x_stride;
      T* y = static_cast<T*>(p.y) + r * p.dim;
      for_row(p.dim, [&](int64_t i, auto n) {
        vf v = tanh(load_n(x + i, n) * alpha) * load_n(weight + i, n);
        if (bias) v += load_n(bias + i, n);
        store_n(y + i, v, n);
      });
    }
  });
}

// With t = tanh(alpha * x) and g = dy * weight * (1 - t^2): dx = alpha * g; dalpha = sum g * x;
// dweight = sum_rows dy * t; dbias = sum_rows dy.
template <class T>
void backward(const DytBackwardParams& p, const Parallel& par) {
  const T* weight = static_cast<const T*>(p.weight);
  const float alpha = to_float(*static_cast<const T*>(p.alpha));
  parallel_row_blocks(par, p.rows, [&](int64_t block, int64_t begin, int64_t end) {
    float* dweight = p.dweight_partial + block * p.dim;
    float* dbias = p.dbias_partial ? p.dbias_partial + block * p.dim : nullptr;
    double dalpha = 0;
    for (int64_t r = begin; r < end; ++r) {
      const T* dy = static_cast<const T*>(p.dy) + r * p.dy_stride;
      const T* x = static_cast<const T*>(p.x) + r * p.x_stride;
      T* dx = static_cast<T*>(p.dx) + r * p.dim;
      vf row_dalpha = zero();
      for_row(p.dim, [&](int64_t i, auto n) {
        vf slope;
        const vf v = load_n(x + i, n), d = load_n(dy + i, n), t = tanh_and_slope(v * alpha, slope);
        const vf g = d * load_n(weight + i, n) * slope;
        store_n(dx + i, g * alpha, n);
        row_dalpha = fma(g, v, row_dalpha);
        store_n(dweight + i, fma(d, t, load_n(dweight + i, n)), n);
        if (dbias) store_n(dbias + i, d + load_n(dbias + i, n), n);
      });
      dalpha += static_cast<double>(reduce_sum(row_dalpha));
    }
    p.dalpha_partial[block] = dalpha;
  });
}

}  // namespace

void dyt_forward(const DytParams& p, const Parallel& par) { LLMCORE_DISPATCH_FLOAT(p.dtype, T, forward<T>(p, par)) }

void dyt_backward(const DytBackwardParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, backward<T>(p, par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
