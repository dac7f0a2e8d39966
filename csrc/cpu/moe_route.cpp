#include "llmcore/moe_route.h"

#include "llmcore/moe_permute.h"
#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

constexpr int64_t kGrainElements = 8192;  // below this a second thread costs more than it saves
constexpr float kTiny = 1.17549435e-38f;  // the smallest normal float: what a sum of chosen scores is clamped to

// Returns the sum of the scores: NaN when one of them is.
template <class T>
float score_row(const T* logits, int64_t n, bool sigmoid_scores, float* scores) {
  vf sum = zero();
  if (sigmoid_scores) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const vf s = sigmoid(load_n(logits + i, n - i));
      store_n(scores + i, s, n - i);
      sum += s;
    }
    return reduce_sum(sum);
  }
  const vf lowest = set1(-__builtin_inff());
  vf largest = lowest;  // a NaN is passed over here, and found in the sum
  for_row(n, [&](int64_t i, auto m) {
    const vf x = load_n(logits + i, m);
    largest = max(m < kLanes ? (iota() < static_cast<int32_t>(m) ? x : lowest) : x, largest);
  });
  const float row_max = reduce_max(largest);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t m = n - i;
    vf e = exp(load_n(logits + i, m) - row_max);
    if (m < kLanes) e = iota() < static_cast<int32_t>(m) ? e : zero();
    store_n(scores + i, e, m);
    sum += e;
  }
  const float total = reduce_sum(sum);
  for (int64_t i = 0; i < n; i += kLanes) store_n(scores + i, load_n(scores + i, n - i) / total, n - i);
  return total;
}

// What group [begin, end) of `choice` is worth.
float group_value(const float* choice, int64_t begin, int64_t end, bool top2) {
  float first = -__builtin_inff(), second = -__builtin_inff();
  for (int64_t i = begin; i < end; ++i) {
    const float c = choice[i];
    if (c > first) {
      second = first;
      first = c;
    } else if (c > second) {
      second = c;
    }
  }
  return top2 && end - begin > 1 ? first + second : first;
}

// Whether values[i] is among the k largest of n; of equals, the lower index comes first.
bool among_best(const float* values, int64_t n, int64_t k, int64_t i) {
  int64_t before = 0;
  for (int64_t j = 0; j < n; ++j) before += values[j] > values[i] || (values[j] == values[i] && j < i);
  return before < k;
}

// Up to this many experts are ranked by comparing each with each, in vectors and without a branch to mispredict; the
// work grows with their square.
constexpr int64_t kRankedExperts = 128;

// order[r] = the expert of rank r, best first; of equals, the lower index comes first.
void rank_experts(const float* choice, int64_t n, int32_t* order) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t lanes = n - i < kLanes ? n - i : kLanes;
    const vf mine = load_n(choice + i, lanes);
    vi rank{};  // how many come before; a true comparison is -1
    for (int64_t j = 0; j < i; ++j) rank -= set1(choice[j]) >= mine;
    for (int64_t j = 0; j < lanes; ++j) {
      const vf c = set1(choice[i + j]);
      rank -= (c > mine) | ((c == mine) & (set1_i(static_cast<int32_t>(j)) < iota()));
    }
    for (int64_t j = i + lanes; j < n; ++j) rank -= set1(choice[j]) > mine;
    int32_t ranks[kLanes];
    __builtin_memcpy(ranks, &rank, sizeof(ranks));
    for (int64_t j = 0; j < lanes; ++j) order[ranks[j]] = static_cast<int32_t>(i + j);
  }
}

// experts = the k best of n, best first, by insertion into the sorted list of the best so far, whose values are `best`.
// Strict comparisons keep the lower index first among equals.
void insert_experts(const float* choice, int64_t n, int64_t k, float* best, int32_t* experts) {
  int64_t held = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float c = choice[i];
    if (held == k && !(c > best[held - 1])) continue;
    int64_t at = held < k ? held++ : held - 1;
    for (; at > 0 && c > best[at - 1]; --at) {
      best[at] = best[at - 1];
      experts[at] = experts[at - 1];
    }
    best[at] = c;
    experts[at] = static_cast<int32_t>(i);
  }
}

// The scores by which experts are chosen: with the bias, and -inf in groups that are not among the best. In `buffer`,
// where they are not the scores themselves.
const float* choice_of(const MoeRouteParams& p, const float* scores, float* buffer, float* group_values) {
  const int64_t n = p.num_experts, size = n / p.num_groups;
  const bool limited = p.topk_groups < p.num_groups;
  if (!p.bias && !limited) return scores;
  for_row(n, [&](int64_t i, auto m) {
    store_n(buffer + i, p.bias ? load_n(scores + i, m) + load_n(p.bias + i, m) : load_n(scores + i, m), m);
  });
  if (!limited) return buffer;
  for (int64_t g = 0; g < p.num_groups; ++g)
    group_values[g] = group_value(buffer, g * size, (g + 1) * size, p.group_top2);
  for (int64_t g = 0; g < p.num_groups; ++g) {
    if (among_best(group_values, p.num_groups, p.topk_groups, g)) continue;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) buffer[i] = -__builtin_inff();
  }
  return buffer;
}

template <class T>
void forward(const MoeRouteParams& p, const Parallel& par) {
  const int64_t n = p.num_experts;
  int64_t tasks = p.tokens * n / kGrainElements + 1;
  if (tasks > par.threads) tasks = par.threads;
  parallel_tasks(par, tasks, [&](int64_t task, int64_t worker) {
    float* biased = p.scratch + worker * (2 * n + p.num_groups);
    float* best = biased + n;
    float* group_values = best + n;
    for (int64_t t = p.tokens * task / tasks; t < p.tokens * (task + 1) / tasks; ++t) {
      float* scores = p.scores + t * n;
      float* weights = p.weights + t * p.top_k;
      int32_t* experts = p.experts + t * p.top_k;
      const float total = score_row(static_cast<const T*>(p.logits) + t * p.logits_stride, n, p.sigmoid, scores);
      if (total != total) {
        if (p.bad_token[worker] < 0) p.bad_token[worker] = t;
        return;
      }
      const float* choice = choice_of(p, scores, biased, group_values);
      if (n <= kRankedExperts) {
        int32_t order[kRankedExperts];
        rank_experts(choice, n, order);
        __builtin_memcpy(experts, order, p.top_k * sizeof(int32_t));
      } else {
        insert_experts(choice, n, p.top_k, best, experts);
      }
      double sum = 0;
      for (int64_t j = 0; j < p.top_k; ++j) sum += scores[experts[j]];
      const double factor = p.renormalize ? p.scale / (sum > kTiny ? sum : kTiny) : p.scale;
      for (int64_t j = 0; j < p.top_k; ++j) weights[j] = static_cast<float>(scores[experts[j]] * factor);
    }
  });
}

}  // namespace

void moe_route_forward(const MoeRouteParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, forward<T>(p, par))
  for (int w = 0; w < par.threads; ++w)
    if (p.bad_token[w] >= 0) return;
  moe_sort({p.tokens, p.top_k, p.num_experts, p.experts, p.offsets, p.row_of, p.token_of, nullptr}, par);
}

// With s = scores, S = sum of the chosen: dL/ds_j = scale * (dw_j - sum_i dw_i s_i / S) / S for the chosen when
// renormalised, scale * dw_j when not, plus dscores; then through softmax or sigmoid.
void moe_route_backward(const MoeRouteBackwardParams& p, const Parallel& par) {
  const int64_t n = p.num_experts;
  parallel_ranges(par, p.tokens, kGrainElements / n + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* scores = p.scores + t * n;
      float* ds = p.dlogits + t * n;
      if (p.dscores)
        __builtin_memcpy(ds, p.dscores + t * n, n * sizeof(float));
      else
        __builtin_memset(ds, 0, n * sizeof(float));
      if (p.dweights) {
        const int32_t* experts = p.experts + t * p.top_k;
        const float* dw = p.dweights + t * p.top_k;
        double sum = 0, dot = 0;
        for (int64_t j = 0; j < p.top_k; ++j) {
          sum += scores[experts[j]];
          dot += static_cast<double>(dw[j]) * scores[experts[j]];
        }
        const bool clamped = sum < kTiny;  // then the divisor is a constant
        const double factor = p.renormalize ? p.scale / (clamped ? kTiny : sum) : p.scale;
        const double mean = p.renormalize && !clamped ? dot / sum : 0;
        for (int64_t j = 0; j < p.top_k; ++j) ds[experts[j]] += static_cast<float>((dw[j] - mean) * factor);
      }
      vf dot = zero();
      if (!p.sigmoid)
        for (int64_t i = 0; i < n; i += kLanes) dot = fma(load_n(scores + i, n - i), load_n(ds + i, n - i), dot);
      const float mean = reduce_sum(dot);
      for (int64_t i = 0; i < n; i += kLanes) {
        const vf s = load_n(scores + i, n - i), d = load_n(ds + i, n - i);
        store_n(ds + i, p.sigmoid ? d * s * (1.f - s) : s * (d - mean), n - i);
      }
    }
  });
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
