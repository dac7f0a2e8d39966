#include "llmcore/norm.h"

#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

template <class T>
void forward(const NormParams& p, const Parallel& par) {
  const T* weight = static_cast<const T*>(p.weight);
  parallel_ranges(par, p.rows, row_grain(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(p.x) + r * p.x_stride;
      const T* residual = p.residual ? static_cast<const T*>(p.residual) + r * p.residual_stride : nullptr;
      T* y = static_cast<T*>(p.y) + r * p.dim;
      T* z = p.residual ? static_cast<T*>(p.z) + r * p.dim : nullptr;
      vf sum = zero();
      if (residual) {
        for_row(p.dim, [&](int64_t i, auto n) {
          store_n(z + i, load_n(x + i, n) + load_n(residual + i, n), n);
          const vf v = load_n(z + i, n);  // what the next layer will see: rounded to the dtype
          sum = fma(v, v, sum);
        });
      } else {
        for_row(p.dim, [&](int64_t i, auto n) {
          const vf v = load_n(x + i, n);
          sum = fma(v, v, sum);
        });
      }
      const float mean = reduce_sum(sum) / static_cast<float>(p.dim);
      const float rstd = 1.f / __builtin_sqrtf(mean + p.eps);
      p.rstd[r] = rstd;
      const T* in = residual ? z : x;
      for_row(p.dim, [&](int64_t i, auto n) { store_n(y + i, load_n(in + i, n) * rstd * load_n(weight + i, n), n); });
    }
  });
}

// With xhat = z * rstd and g = dy * weight: dz = rstd * (g - xhat * mean(g * xhat)); dweight = sum_rows dy * xhat.
template <class T>
void backward(const NormBackwardParams& p, const Parallel& par) {
  const T* weight = static_cast<const T*>(p.weight);
  parallel_row_blocks(par, p.rows, [&](int64_t block, int64_t begin, int64_t end) {
    float* dweight = p.dweight_partial + block * p.dim;
    for (int64_t r = begin; r < end; ++r) {
      const T* dy = static_cast<const T*>(p.dy) + r * p.dy_stride;
      const T* dz = p.dz ? static_cast<const T*>(p.dz) + r * p.dz_stride : nullptr;
      const T* z = static_cast<const T*>(p.z) + r * p.z_stride;
      T* dx = static_cast<T*>(p.dx) + r * p.dim;
      const float rstd = p.rstd[r];
      vf dot = zero();
      for_row(p.dim, [&](int64_t i, auto n) {
        const vf xhat = load_n(z + i, n) * rstd, d = load_n(dy + i, n);
        store_n(dweight + i, fma(d, xhat, load_n(dweight + i, n)), n);
        dot = fma(d * load_n(weight + i, n), xhat, dot);
      });
      const float mean = reduce_sum(dot) / static_cast<float>(p.dim);
      for_row(p.dim, [&](int64_t i, auto n) {
        vf g = rstd * (load_n(dy + i, n) * load_n(weight + i, n) - load_n(z + i, n) * (rstd * mean));
        if (dz) g += load_n(dz + i, n);
        store_n(dx + i, g, n);
      });
    }
  });
}

}  // namespace

void rms_norm_forward(const NormParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, forward<T>(p, par))
}

void rms_norm_backward(const NormBackwardParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, backward<T>(p, par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
