// One pass over memory, which bounds it: gradient, moments and master are read, moments, master and weight written.
#include "llmcore/adamw.h"

#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

// Elements [begin, end) of a tensor.
template <class W, class G>
void update(const AdamwParams& p, const AdamwTensor& tensor, const AdamwFactors& factors, int64_t begin, int64_t end) {
  const float rate1 = static_cast<float>(1 - p.beta1), rate2 = static_cast<float>(1 - p.beta2);
  const float beta2 = static_cast<float>(p.beta2), eps = static_cast<float>(p.eps);
  const G* grad = static_cast<const G*>(tensor.grad) + begin;
  float *exp_avg = tensor.exp_avg + begin, *exp_avg_sq = tensor.exp_avg_sq + begin, *master = tensor.master + begin;
  for_row(end - begin, [&](int64_t i, auto n) {
    const vf g = load_n(grad + i, n) * factors.grad, old_m = load_n(exp_avg + i, n), old_w = load_n(master + i, n);
    const vf m = fma(set1(rate1), g - old_m, old_m);
    const vf v = fma(set1(beta2), load_n(exp_avg_sq + i, n), g * g * rate2);
    const vf w = old_w - fma(set1(factors.decay), old_w, factors.step_size * (m / (sqrt(v) * factors.root + eps)));
    store_n(exp_avg + i, m, n);
    store_n(exp_avg_sq + i, v, n);
    store_n(master + i, w, n);
    if constexpr (sizeof(W) == 2) store_n(static_cast<W*>(tensor.weight) + begin + i, w, n);
  });
}

template <class W, class G>
void update_all(const AdamwParams& p, const Parallel& par) {
  parallel_ranges(par, p.tiles, 2, [&](int64_t begin, int64_t end) {
    int64_t at = 0;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (at + 1 < p.count && p.tensors[at + 1].first_tile <= tile) ++at;
      const AdamwTensor& tensor = p.tensors[at];
      const AdamwFactors factors = p.factors[at];
      if (factors.grad != factors.grad) continue;
      const int64_t first = (tile - tensor.first_tile) * kAdamwTile, last = first + kAdamwTile;
      update<W, G>(p, tensor, factors, first, last < tensor.size ? last : tensor.size);
    }
  });
}

}  // namespace

void adamw(const AdamwParams& p, const Parallel& par) {
  for (int64_t i = 0; i < p.count; ++i) p.factors[i] = adamw_factors(p, p.tensors[i].step);
  LLMCORE_DISPATCH_FLOAT(p.weight_dtype, W, if (p.grad_dtype == DType::f32) update_all<W, float>(p, par);
                         else update_all<W, W>(p, par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
