// One row of logits, or a part of it, for linear_cross_entropy.cpp and cross_entropy.cpp.
#pragma once
#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

inline void cap(float* row, int64_t n, float softcap) {
  for (int64_t j = 0; j < n; j += kLanes) store_n(row + j, softcap * tanh(load_n(row + j, n - j) / softcap), n - j);
}

// Of n >= 1 logits: stats[0] the maximum, stats[step] the sum of exp(logit - maximum), stats[2 * step] the sum.
// keep(j, exponentials, logits, lanes) gets the n exponentials too, for gradients.
template <class Keep>
inline void summarise(const float* row, int64_t n, float* stats, int64_t step, const Keep& keep) {
  vf top = set1(-__builtin_inff()), total = zero();
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const vf x = load(row + j);
    top = max(top, x);
    total += x;
  }
  float row_max = reduce_max(top), row_total = reduce_sum(total);
  for (int64_t i = j; i < n; ++i) {
    row_max = row[i] > row_max ? row[i] : row_max;
    row_total += row[i];
  }
  vf sum = zero();
  for (j = 0; j + kLanes <= n; j += kLanes) {
    const vf x = load(row + j), e = exp2_nonpositive((x - row_max) * kLog2e);
    sum += e;
    keep(j, e, x, FullVector{});
  }
  if (j < n) {
    const vf x = load_n(row + j, n - j), e = exp2_nonpositive((x - row_max) * kLog2e);
    sum += iota() < static_cast<int32_t>(n - j) ? e : zero();
    keep(j, e, x, n - j);
  }
  stats[0] = row_max;
  stats[step] = reduce_sum(sum);
  stats[2 * step] = row_total;
}
inline void summarise(const float* row, int64_t n, float* stats, int64_t step) {
  summarise(row, n, stats, step, [](int64_t, vf, vf, auto) {});
}

// What the gradient of a row needs besides its logits. Params: those of an op over rows of logits.
struct RowGradient {
  float lse, of_lse, of_mean, of_target, inverse_cap;
  template <class Params>
  RowGradient(const Params& p, float dloss, float row_lse)
      : lse(row_lse),
        of_lse(dloss * (1.f + 2.f * p.z_loss * row_lse)),
        of_mean(dloss * p.label_smoothing / static_cast<float>(p.vocab)),
        of_target(dloss * (1.f - p.label_smoothing)),
        inverse_cap(p.softcap > 0.f ? 1.f / p.softcap : 0.f) {}
  // Of capped logits x, to which the loss gives `direct` besides their share of lse.
  LLMCORE_INLINE vf operator()(vf x, vf direct) const {
    const vf tanh_of = x * inverse_cap;  // 0 without softcap
    return (exp2_nonpositive((x - lse) * kLog2e) * of_lse - direct) * (1.f - tanh_of * tanh_of);
  }
  float at_target(float x) const { return (*this)(set1(x), set1(of_mean + of_target))[0]; }
};

// The gradients of n capped logits: G is what the products that follow take. `out` may be where the logits are, whose
// row 16 bits fill to the half. `target` is an index into them, or outside [0, n).
template <class G>
void differentiate(const float* logits, G* out, int64_t n, int64_t target, const RowGradient& gradient) {
  const bool holds_target = target >= 0 && target < n;
  const float at_target = holds_target ? gradient.at_target(logits[target]) : 0.f;
  for_row(n, [&](int64_t j, auto lanes) {
    store_n(out + j, gradient(load_n(logits + j, lanes), set1(gradient.of_mean)), lanes);
  });
  if (holds_target) out[target] = from_float<G>(at_target);
}

}  // namespace
}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
