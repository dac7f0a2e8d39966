#include "llmcore/norm.h"

#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

// Centred: layer normalisation. Not: RMS normalisation, whose mean stays 0 and which has no bias.
template <class T, bool Centred>
void forward(const NormParams& p, const Parallel& par) {
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  const float dim = static_cast<float>(p.dim);  // a rounded 1 / dim would pull every row's mean the same way
  parallel_ranges(par, p.rows, row_grain(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(p.x) + r * p.x_stride;
      T* y = static_cast<T*>(p.y) + r * p.dim;
      const auto add = [](vf v, vf* sums) { sums[0] = Centred ? sums[0] + v : fma(v, v, sums[0]); };
      float sum[1];  // of the elements, or of their squares
      if (p.residual) {
        const T* residual = static_cast<const T*>(p.residual) + r * p.residual_stride;
        T* z = static_cast<T*>(p.z) + r * p.dim;
        sum_row(p.dim, sum, [&](int64_t i, auto n, vf* sums) {
          store_n(z + i, load_n(x + i, n) + load_n(residual + i, n), n);
          add(load_n(z + i, n), sums);  // what the next layer will see: rounded to the dtype
        });
        x = z;
      } else {
        sum_row(p.dim, sum, [&](int64_t i, auto n, vf* sums) { add(load_n(x + i, n), sums); });
      }
      float mean = 0.f;
      if constexpr (Centred) {
        // A second pass over the row, in cache by now: E[x^2] - mean^2 would cancel when the mean is large.
        p.mean[r] = mean = sum[0] / dim;
        sum_row(p.dim, sum, [&](int64_t i, auto n, vf* sums) {
          const vf v = first_n(load_n(x + i, n) - mean, n);
          sums[0] = fma(v, v, sums[0]);
        });
      }
      const float rstd = p.rstd[r] = 1.f / __builtin_sqrtf(sum[0] / dim + p.eps);
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

// With xhat = (z - mean) * rstd and g = dy * weight: dz = rstd * (g - mean(g) - xhat * mean(g * xhat)), without mean(g)
// when not centred; dweight = sum_rows dy * xhat; dbias = sum_rows dy.
template <class T, bool Centred>
class Backward {
 public:
  explicit Backward(const NormBackwardParams& p) : p_(p), weight_(static_cast<const T*>(p.weight)) {}

  void run(const Parallel& par) const {
    parallel_row_blocks(par, p_.rows, [&](int64_t block, int64_t begin, int64_t end) {
      float* dweight = p_.dweight_partial + block * p_.dim;
      float* dbias = p_.dbias_partial ? p_.dbias_partial + block * p_.dim : nullptr;
      int64_t r = begin;
      for (; r + kRows <= end; r += kRows) rows<kRows>(r, dweight, dbias);
      for (; r < end; ++r) rows<1>(r, dweight, dbias);
    });
  }

 private:
  static constexpr int kRows = 4;  // taken together, so that dweight and dbias are read and written once for all

  struct Row {
    const T *dy, *dz, *z;
    T* dx;
    float mean, rstd, mean_g, mean_dot;
  };

  Row row(int64_t r) const {
    Row x{static_cast<const T*>(p_.dy) + r * p_.dy_stride,
          p_.dz ? static_cast<const T*>(p_.dz) + r * p_.dz_stride : nullptr,
          static_cast<const T*>(p_.z) + r * p_.z_stride,
          static_cast<T*>(p_.dx) + r * p_.dim,
          Centred ? p_.mean[r] : 0.f,
          p_.rstd[r],
          0.f,
          0.f};
    float sum[2];
    sum_row(p_.dim, sum, [&](int64_t i, auto n, vf* sums) {
      const vf g = gradient(x, i, n);
      if constexpr (Centred) sums[0] += g;
      sums[1] = fma(g, normalised(x, i, n), sums[1]);
    });
    const float dim = static_cast<float>(p_.dim);
    x.mean_g = sum[0] / dim;
    x.mean_dot = sum[1] / dim;
    return x;
  }

  template <class N>
  LLMCORE_INLINE vf normalised(const Row& x, int64_t i, N n) const {
    return (load_n(x.z + i, n) - x.mean) * x.rstd;
  }
  // A rounded number of its own wherever it is used: where all g are equal, g - mean(g) is 0.
  template <class N>
  LLMCORE_INLINE vf gradient(const Row& x, int64_t i, N n) const {
    return rounded(load_n(x.dy + i, n) * load_n(weight_ + i, n));
  }

  template <int Count>
  void rows(int64_t first, float* dweight, float* dbias) const {
    Row x[Count];
    for (int r = 0; r < Count; ++r) x[r] = row(first + r);
    for_row(p_.dim, [&](int64_t i, auto n) {
      vf of_weight = load_n(dweight + i, n), of_bias = dbias ? load_n(dbias + i, n) : zero();
      for (int r = 0; r < Count; ++r) {
        const vf xhat = normalised(x[r], i, n), d = load_n(x[r].dy + i, n);
        of_weight = fma(d, xhat, of_weight);
        of_bias += d;
        vf dx = x[r].rstd * (gradient(x[r], i, n) - x[r].mean_g - xhat * x[r].mean_dot);
        if (x[r].dz) dx += load_n(x[r].dz + i, n);
        store_n(x[r].dx + i, dx, n);
      }
      store_n(dweight + i, of_weight, n);
      if (dbias) store_n(dbias + i, of_bias, n);
    });
  }

  const NormBackwardParams& p_;
  const T* weight_;
};

}  // namespace

void rms_norm_forward(const NormParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, forward<T, false>(p, par))
}
void layer_norm_forward(const NormParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, forward<T, true>(p, par))
}
void rms_norm_backward(const NormBackwardParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, Backward<T, false>(p).run(par))
}
void layer_norm_backward(const NormBackwardParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, Backward<T, true>(p).run(par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
