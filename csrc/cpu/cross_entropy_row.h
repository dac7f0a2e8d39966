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
inline void summarise(const float* row, int64_t n, float* stats, int64_t step) {
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
  for (j = 0; j + kLanes <= n; j += kLanes) sum += exp2_nonpositive((load(row + j) - row_max) * kLog2e);
  if (j < n) {
    const vf e = exp2_nonpositive((load_n(row + j, n - j) - row_max) * kLog2e);
    sum += iota() < static_cast<int32_t>(n - j) ? e : zero();
  }
  stats[0] = row_max;
  stats[step] = reduce_sum(sum);
  stats[2 * step] = row_total;
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
};

// Turns n capped logits into their gradient, in place: G is what the products that follow take, and 16 bits fill the
// first half of the row. `target` is an index into them, or outside [0, n).
template <class G>
void differentiate(float* logits, int64_t n, int64_t target, const RowGradient& r) {
  const auto gradient = [&](vf x, vf direct) {
    const vf tanh_of = x * r.inverse_cap;  // 0 without softcap
    return (exp2_nonpositive((x - r.lse) * kLog2e) * r.of_lse - direct) * (1.f - tanh_of * tanh_of);
  };
  const bool holds_target = target >= 0 && target < n;
  const float at_target = holds_target ? gradient(set1(logits[target]), set1(r.of_mean + r.of_target))[0] : 0.f;
  G* out = reinterpret_cast<G*>(logits);
  for_row(
      n, [&](int64_t j, auto lanes) { store_n(out + j, gradient(load_n(logits + j, lanes), set1(r.of_mean)), lanes); });
  if (holds_target) out[target] = from_float<G>(at_target);
}

}  // namespace
}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
