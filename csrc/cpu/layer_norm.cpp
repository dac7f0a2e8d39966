#include "llmcore/norm.h"

#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

template <class T>
void forward(const NormParams& p, const Parallel& par) {
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  const float dim = static_cast<float>(p.dim);  // a rounded 1 / dim would pull every row's mean the same way
  parallel_ranges(par, p.rows, row_grain(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(p.x) + r * p.x_stride;
      T* y = static_cast<T*>(p.y) + r * p.dim;
      vf sum = zero();
      if (p.residual) {
        const T* residual = static_cast<const T*>(p.residual) + r * p.residual_stride;
        T* z = static_cast<T*>(p.z) + r * p.dim;
        for_row(p.dim, [&](int64_t i, auto n) {
          store_n(z + i, load_n(x + i, n) + load_n(residual + i, n), n);
          sum += load_n(z + i, n);  // what the next layer will see: rounded to the dtype
        });
        x = z;
      } else {
        for_row(p.dim, [&](int64_t i, auto n) { sum += load_n(x + i, n); });
      }
      const float mean = reduce_sum(sum) / dim;
      // A second pass over the row, in cache by now: E[x^2] - mean^2 would cancel when the mean is large.
      vf square = zero();
      const int64_t whole = p.dim / kLanes * kLanes;
      for (int64_t i = 0; i < whole; i += kLanes) {
        const vf v = load(x + i) - mean;
        square = fma(v, v, square);
      }
      float variance = reduce_sum(square);
      for (int64_t i = whole; i < p.dim; ++i) variance += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
      const float rstd = 1.f / __builtin_sqrtf(variance / dim + p.eps);
      p.mean[r] = mean;
      p.rstd[r] = rstd;
      if (bias) {
        for_row(p.dim, [&](int64_t i, auto n) {
          const vf xhat = (load_n(x + i, n) - mean) * rstd;
          store_n(y + i, fma(xhat, load_n(weight + i, n), load_n(bias + i, n)), n);
        });
      } else {
        for_row(p.dim, [&](int64_t i, auto n) {
          store_n(y + i, (load_n(x + i, n) - mean) * rstd * load_n(weight + i, n), n);
        });
      }
    }
  });
}

// With xhat = (z - mean) * rstd and g = dy * weight: dz = rstd * (g - mean(g) - xhat * mean(g * xhat));
// dweight = sum_rows dy * xhat; dbias = sum_rows dy.
template <class T>
void backward(const NormBackwardParams& p, const Parallel& par) {
  const T* weight = static_cast<const T*>(p.weight);
  const float dim = static_cast<float>(p.dim);
  parallel_row_blocks(par, p.rows, [&](int64_t block, int64_t begin, int64_t end) {
    float* dweight = p.dweight_partial + block * p.dim;
    float* dbias = p.dbias_partial ? p.dbias_partial + block * p.dim : nullptr;
    for (int64_t r = begin; r < end; ++r) {
      const T* dy = static_cast<const T*>(p.dy) + r * p.dy_stride;
      const T* dz = p.dz ? static_cast<const T*>(p.dz) + r * p.dz_stride : nullptr;
      const T* z = static_cast<const T*>(p.z) + r * p.z_stride;
      T* dx = static_cast<T*>(p.dx) + r * p.dim;
      const float mean = p.mean[r], rstd = p.rstd[r];
      vf sum = zero(), dot = zero();
      for_row(p.dim, [&](int64_t i, auto n) {
        const vf xhat = (load_n(z + i, n) - mean) * rstd, d = load_n(dy + i, n);
        const vf g = rounded(d * load_n(weight + i, n));  // the same number in both passes: where all g are equal,
                                                          // g - mean(g) is 0
        store_n(dweight + i, fma(d, xhat, load_n(dweight + i, n)), n);
        if (dbias) store_n(dbias + i, d + load_n(dbias + i, n), n);
        sum += g;
        dot = fma(g, xhat, dot);
      });
      const float mean_g = reduce_sum(sum) / dim, mean_dot = reduce_sum(dot) / dim;
      for_row(p.dim, [&](int64_t i, auto n) {
        const vf xhat = (load_n(z + i, n) - mean) * rstd;
        const vf g = rounded(load_n(dy + i, n) * load_n(weight + i, n));
        vf gradient = rstd * (g - mean_g - xhat * mean_dot);
        if (dz) gradient += load_n(dz + i, n);
        store_n(dx + i, gradient, n);
      });
    }
  });
}

}  // namespace

void layer_norm_forward(const NormParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, forward<T>(p, par))
}

void layer_norm_backward(const NormBackwardParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, backward<T>(p, par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
