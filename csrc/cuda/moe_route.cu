// The router of a mixture of experts. A warp takes one token after the other: scores, groups, top_k rounds that each
// take the best expert left, weights. Up to kHeldExperts experts stay in registers, lane l holding experts l, l + 32,
// ...; more live in memory, each still touched by its own lane alone. The same kernel counts what its CTA chose, the
// first half of the sort by expert (moe_sort.cuh).
#include "llmcore/moe_route.h"

#include "moe_sort.cuh"
#include "reduce.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr int kThreads = kSortThreads, kWarps = kThreads / 32;
constexpr int kHeldExperts = 512, kHeldTopK = 32;  // top_k: lane j has the j-th choice
constexpr float kTiny = 1.17549435e-38f;  // the smallest normal float: what a sum of chosen scores is clamped to

PTX_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % 32); }

// Floats as integers of the same order. 0 is below every number: an expert or group that cannot be chosen (any more).
// Choices are never -0, which would come out below 0: a score is not, and the sum of a score and a bias neither.
constexpr uint32_t kNotThere = 0;
PTX_DEVICE uint32_t key_of(float x) {
  const uint32_t u = ptx::bits(x);
  return u >> 31 ? ~u : u | 0x80000000u;
}
PTX_DEVICE float value_of(uint32_t key) { return ptx::from_bits(key >> 31 ? key & 0x7fffffffu : ~key); }

// f(place, item) for the items of this lane, in ascending order. PerLane > 0: a constant place in registers after
// unrolling, also for items that are not below n. PerLane 0: the place is the item.
template <int PerLane, class F>
PTX_DEVICE void each(int n, const F& f) {
  if constexpr (PerLane > 0) {
#pragma unroll
    for (int i = 0; i < PerLane; ++i) f(i, lane_id() + 32 * i);
  } else {
    for (int item = lane_id(); item < n; item += 32) f(item, item);
  }
}

// The item of the largest key, in every lane; of equals the lowest. It is taken out.
template <int PerLane, class Keys>
PTX_DEVICE int take_best(Keys& keys, int n) {
  uint32_t best = 0, first = ~0u;
  each<PerLane>(n, [&](int i, int) { best = keys[i] > best ? keys[i] : best; });
  best = ptx::warp_max(best);
  each<PerLane>(n, [&](int i, int item) {
    if (keys[i] == best && static_cast<uint32_t>(item) < first) first = static_cast<uint32_t>(item);
  });
  first = ptx::warp_min(first);
  each<PerLane>(n, [&](int i, int item) {
    if (static_cast<uint32_t>(item) == first) keys[i] = kNotThere;
  });
  return static_cast<int>(first);
}

// What a group of keys is worth, in every lane: its best, or the sum of its two best.
PTX_DEVICE float group_value(const uint32_t* keys, int size, bool top2) {
  uint32_t first = kNotThere, second = kNotThere;
  for (int i = lane_id(); i < size; i += 32) {
    const uint32_t key = keys[i];
    second = key > first ? first : key > second ? key : second;
    first = key > first ? key : first;
  }
  const uint32_t best = ptx::warp_max(first);
  if (!top2 || size < 2) return value_of(best);
  const uint32_t holders = ptx::ballot(first == best);
  // Of one lane that holds the best, the second; of the others, the first.
  const bool gives_second = first == best && (holders & ((1u << lane_id()) - 1)) == 0;
  return value_of(best) + value_of(ptx::warp_max(gives_second ? second : first));
}

// Takes the experts of all but the best groups out of keys (num_experts). `groups` (num_groups) is working memory; both
// are in shared or global memory and this warp's own.
PTX_DEVICE void keep_best_groups(const MoeRouteParams& p, uint32_t* keys, uint32_t* groups) {
  const int count = static_cast<int>(p.num_groups), size = static_cast<int>(p.num_experts / p.num_groups);
  ptx::syncwarp();  // the keys are there
  for (int g = 0; g < count; ++g) {
    const float value = group_value(keys + g * size, size, p.group_top2);
    if (lane_id() == g % 32) groups[g] = key_of(value);
  }
  for (int kept = 0; kept < static_cast<int>(p.topk_groups); ++kept) take_best<0>(groups, count);
  ptx::syncwarp();
  for (int g = 0; g < count; ++g)
    if (groups[g] != kNotThere)  // left over
      for (int i = lane_id(); i < size; i += 32) keys[g * size + i] = kNotThere;
  ptx::syncwarp();
}

// Turns logits into scores in place.
template <int PerLane, class Scores>
PTX_DEVICE void score(Scores& scores, int n, bool sigmoid) {
  if (sigmoid) {
    each<PerLane>(n, [&](int i, int) {
      const float e = expf(-fabsf(scores[i])), positive = ptx::reciprocal(1.f + e);
      scores[i] = scores[i] < 0.f ? e * positive : positive;
    });
    return;
  }
  float largest = -INFINITY, total = 0.f;
  each<PerLane>(n, [&](int i, int) { largest = fmaxf(largest, scores[i]); });
  largest = lanes_max<32>(largest);
  each<PerLane>(n, [&](int i, int) {
    scores[i] = expf(scores[i] - largest);
    total += scores[i];
  });
  const float scale = 1.f / lanes_sum<32>(total);
  // rounded by itself: what the bias is added to is the score that is reported
  each<PerLane>(n, [&](int i, int) { scores[i] = ptx::product(scores[i], scale); });
}

// Chooses the experts of one token; lane j has the j-th in `mine` where top_k is at most 32, and all are written to
// p.experts. False when the scores are not numbers.
template <int PerLane, class Scores, class Keys>
PTX_DEVICE bool choose(const MoeRouteParams& p, int token, Scores& scores, Keys& keys, uint32_t* memory, int& mine) {
  const int n = static_cast<int>(p.num_experts), top_k = static_cast<int>(p.top_k);
  bool numbers = true;
  const auto set = [&](int i, int e, float choice) {
    numbers = numbers && choice == choice;
    keys[i] = e < n ? key_of(choice) : kNotThere;
  };
  if (p.bias)
    each<PerLane>(n, [&](int i, int e) { set(i, e, scores[i] + (e < n ? p.bias[e] : 0.f)); });
  else
    each<PerLane>(n, [&](int i, int e) { set(i, e, scores[i]); });
  numbers = ptx::ballot(!numbers) == 0;
  if (p.topk_groups < p.num_groups && numbers) {
    if constexpr (PerLane > 0)
      each<PerLane>(n, [&](int i, int e) {
        if (e < n) memory[e] = keys[i];
      });
    keep_best_groups(p, memory, memory + n);
    if constexpr (PerLane > 0)
      each<PerLane>(n, [&](int i, int e) {
        if (e < n) keys[i] = memory[e];
      });
  }
  int32_t* experts = p.experts + int64_t{token} * p.top_k;
#pragma unroll 1
  for (int j = 0; j < top_k; ++j) {
    const int best = numbers ? take_best<PerLane>(keys, n) : j;
    if (lane_id() == j % 32) mine = best;
    if (j % 32 == 31 || j == top_k - 1)
      if (const int at = j / 32 * 32 + lane_id(); at <= j) experts[at] = mine;
  }
  return numbers;
}

// Weights of one token, whose scores and experts are in global memory, and the tally of its experts.
template <bool Held>
PTX_DEVICE void weigh(const MoeRouteParams& p, int token, bool numbers, int mine, int32_t* tally) {
  const float* scores = p.scores + int64_t{token} * p.num_experts;
  const int32_t* experts = p.experts + int64_t{token} * p.top_k;
  float* weights = p.weights + int64_t{token} * p.top_k;
  const int top_k = static_cast<int>(p.top_k);
  ptx::syncwarp();  // other lanes wrote the scores
  float sum = 0.f, chosen = 0.f;
  for (int j = lane_id(); j < top_k; j += 32) {
    const int expert = Held ? mine : experts[j];
    chosen = scores[expert];
    sum += chosen;
    ptx::red_add(tally + expert, 1);
    if (Held) break;
  }
  sum = lanes_sum<32>(sum);
  const float divisor = !p.renormalize ? 1.f : sum > kTiny ? sum : kTiny;
  for (int j = lane_id(); j < top_k; j += 32) {
    if (!Held) chosen = scores[experts[j]];
    weights[j] = numbers ? chosen / divisor * p.scale : ptx::from_bits(0x7fc00000);
    if (Held) break;
  }
}

// This lane's logits of a token; of none, when it is not below `end`.
template <class T, int PerLane>
PTX_DEVICE void fetch_logits(const MoeRouteParams& p, int token, int end, T (&row)[PerLane]) {
  if (token >= end) return;
  const int n = static_cast<int>(p.num_experts);
  const T* logits = static_cast<const T*>(p.logits) + int64_t{token} * p.logits_stride;
  each<PerLane>(n, [&](int i, int e) { row[i] = e < n ? logits[e] : T{}; });
}

// At most 32 * PerLane experts and top_k of at most 32: everything in registers. `memory` is for the groups.
template <class T, int PerLane>
PTX_DEVICE void route_held(const MoeRouteParams& p, int begin, int end, uint32_t* memory, int32_t* tally) {
  constexpr bool kAhead = PerLane <= 8;  // the next token's logits are on their way while one is worked on
  const int n = static_cast<int>(p.num_experts);
  T row[PerLane] = {};
  if (kAhead) fetch_logits(p, begin, end, row);
  for (int token = begin; token < end; token += kWarps) {
    if (!kAhead) fetch_logits(p, token, end, row);
    float scores[PerLane];
    each<PerLane>(n, [&](int i, int e) { scores[i] = e < n ? to_float(row[i]) : -INFINITY; });
    if (kAhead) fetch_logits(p, token + kWarps, end, row);
    score<PerLane>(scores, n, p.sigmoid);
    float* out = p.scores + int64_t{token} * p.num_experts;
    each<PerLane>(n, [&](int i, int e) {
      if (e < n) out[e] = scores[i];
    });
    uint32_t keys[PerLane];
    int mine = 0;
    const bool numbers = choose<PerLane>(p, token, scores, keys, memory, mine);
    weigh<true>(p, token, numbers, mine, tally);
  }
}

// Any number: scores where they belong, keys in `memory`.
template <class T>
PTX_DEVICE void route_stored(const MoeRouteParams& p, int begin, int end, uint32_t* memory, int32_t* tally) {
  const int n = static_cast<int>(p.num_experts);
  for (int token = begin; token < end; token += kWarps) {
    const T* logits = static_cast<const T*>(p.logits) + int64_t{token} * p.logits_stride;
    float* scores = p.scores + int64_t{token} * p.num_experts;
    each<0>(n, [&](int, int e) { scores[e] = to_float(logits[e]); });
    score<0>(scores, n, p.sigmoid);
    int mine = 0;
    const bool numbers = choose<0>(p, token, scores, memory, memory, mine);
    weigh<false>(p, token, numbers, mine, tally);
  }
}

// PerLane 0: route_stored. A CTA's memory is its tally of the experts, then for each warp the keys of experts and
// groups: shared where it fits, else in the workspace, where the tally is the CTA's row of counts.
template <class T, int PerLane>
__global__ void __launch_bounds__(kThreads, 1) route(MoeRouteParams p, SortPlan plan) {
  PTX_SHARED_MEMORY(shared);
  const int n = static_cast<int>(p.num_experts), warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t keys = p.num_experts + p.num_groups;  // of a warp
  int32_t* const counts = static_cast<int32_t*>(p.workspace) + blockIdx.x * p.num_experts;
  int32_t* const tally = PerLane ? reinterpret_cast<int32_t*>(shared) : counts;
  for (int e = static_cast<int>(threadIdx.x); e < n; e += kThreads) tally[e] = 0;
  ptx::syncthreads();
  // 32 bits hold a token's number, as they hold the rows'; an offset takes 64
  const int64_t next = (blockIdx.x + 1) * plan.tokens_per_cta;
  const int begin = static_cast<int>(next - plan.tokens_per_cta) + warp;
  const int end = static_cast<int>(next < p.tokens ? next : p.tokens);
  if constexpr (PerLane == 0) {
    uint32_t* memory = static_cast<uint32_t*>(p.workspace) + sort_workspace(plan, p.num_experts) / sizeof(uint32_t);
    route_stored<T>(p, begin, end, memory + (int64_t{blockIdx.x} * kWarps + warp) * keys, tally);
  } else {
    uint32_t* memory = reinterpret_cast<uint32_t*>(shared) + p.num_experts;
    route_held<T, PerLane>(p, begin, end, memory + warp * keys, tally);
    ptx::syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < n; e += kThreads) counts[e] = tally[e];
  }
}

// With s = scores, S = sum of the chosen: dL/ds_j = scale * (dw_j - sum_i dw_i s_i / S) / S for the chosen when
// renormalised, scale * dw_j when not, plus dscores; then through softmax or sigmoid. A warp takes a token. It writes
// the row as if none were chosen, then those that are over it.
constexpr int kBackwardThreads = 256;

__global__ void __launch_bounds__(kBackwardThreads) backward(MoeRouteBackwardParams p) {
  constexpr int64_t kTokens = kBackwardThreads / 32;
  const int64_t n = p.num_experts;
  const int top_k = p.dweights ? static_cast<int>(p.top_k) : 0;
  for (int64_t t = blockIdx.x * kTokens + threadIdx.x / 32; t < p.tokens; t += gridDim.x * kTokens) {
    const float* scores = p.scores + t * n;
    const float* dscores = p.dscores ? p.dscores + t * n : nullptr;
    const float* dweights = p.dweights ? p.dweights + t * p.top_k : nullptr;
    const int32_t* experts = p.experts + t * p.top_k;
    float* dlogits = p.dlogits + t * n;
    float sum = 0.f, dot = 0.f;
    for (int j = lane_id(); j < top_k; j += 32) {
      sum += scores[experts[j]];
      dot += dweights[j] * scores[experts[j]];
    }
    sum = lanes_sum<32>(sum);
    dot = lanes_sum<32>(dot);
    const bool clamped = sum < kTiny;  // then the divisor is a constant
    const float divisor = !p.renormalize ? 1.f : clamped ? kTiny : sum;
    const float mean = p.renormalize && !clamped ? dot / sum : 0.f;
    const auto of_choice = [&](int j) { return (dweights[j] - mean) * p.scale / divisor; };

    float product = 0.f;  // of the scores and their gradients, which softmax takes off each
    if (!p.sigmoid) {
      if (dscores)
        for (int64_t e = lane_id(); e < n; e += 32) product += scores[e] * dscores[e];
      for (int j = lane_id(); j < top_k; j += 32) product += scores[experts[j]] * of_choice(j);
      product = lanes_sum<32>(product);
    }
    const auto through = [&](float s, float ds) { return p.sigmoid ? ds * s * (1.f - s) : s * (ds - product); };
    for (int64_t e = lane_id(); e < n; e += 32) dlogits[e] = through(scores[e], dscores ? dscores[e] : 0.f);
    ptx::syncwarp();
    for (int j = lane_id(); j < top_k; j += 32) {
      const int32_t e = experts[j];
      dlogits[e] = through(scores[e], (dscores ? dscores[e] : 0.f) + of_choice(j));
    }
  }
}

bool limited(const MoeRouteParams& p) { return p.topk_groups < p.num_groups; }

// Shared memory of a call that is served from registers.
int64_t held_bytes(const MoeRouteParams& p) {
  return (p.num_experts + (limited(p) ? kWarps * (p.num_experts + p.num_groups) : 0)) * static_cast<int64_t>(4);
}
bool held(const MoeRouteParams& p, const Device& device) {
  return p.num_experts <= kHeldExperts && p.top_k <= kHeldTopK && held_bytes(p) <= device.shared_bytes;
}

template <class T>
Status run(const MoeRouteParams& p, const SortPlan& plan, const Device& device) {
  const auto start = [&](auto kernel, int64_t shared_bytes) {
    return launch(kernel, {plan.ctas}, kThreads, static_cast<int>(shared_bytes), device, p, plan);
  };
  if (!held(p, device)) return start(route<T, 0>, 0);
  if (p.num_experts <= 32) return start(route<T, 1>, held_bytes(p));
  if (p.num_experts <= 64) return start(route<T, 2>, held_bytes(p));
  if (p.num_experts <= 128) return start(route<T, 4>, held_bytes(p));
  if (p.num_experts <= 256) return start(route<T, 8>, held_bytes(p));
  return start(route<T, 16>, held_bytes(p));
}

}  // namespace

int64_t moe_route_forward_workspace(const MoeRouteParams& p, const Device& device) {
  const SortPlan plan = sort_plan(p.tokens, p.num_experts, device);
  const int64_t keys = held(p, device) ? 0 : int64_t{plan.ctas} * kWarps * (p.num_experts + p.num_groups);
  return sort_workspace(plan, p.num_experts) + keys * static_cast<int64_t>(sizeof(uint32_t));
}

Status moe_route_forward(const MoeRouteParams& p, const Device& device) {
  // What a warp counts its tokens with, 32 bits, also holds where it would go on behind the last one.
  constexpr int64_t kMaxTokens = INT32_MAX - 65536;
  if (p.tokens > kMaxTokens) return "moe_route: there are more tokens than the CUDA kernel takes, 2^31 - 65537";
  const SortPlan plan = sort_plan(p.tokens, p.num_experts, device);
  Status error = "unknown dtype";
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, error = (run<T>(p, plan, device)))
  if (error) return error;
  return write_sorted_rows({p.tokens, p.top_k, p.num_experts, p.experts, p.offsets, p.row_of, p.token_of, p.workspace},
                           plan, device);
}

Status moe_route_backward(const MoeRouteBackwardParams& p, const Device& device) {
  constexpr int64_t kTokens = kBackwardThreads / 32;
  const int64_t ctas = (p.tokens + kTokens - 1) / kTokens, most = 32 * int64_t{device.multiprocessors};
  return launch(backward, {ctas < most ? ctas : most}, kBackwardThreads, 0, device, p);
}

}  // namespace cuda
}  // namespace llmcore
