#include "llmcore/moe_permute.h"

#include <algorithm>

#include "moe.h"

using namespace llmcore;
using namespace races;

namespace {

// The CPU kernel on the ids that the CUDA kernel makes of those outside.
void sort_clamped(const MoeSortParams& p, const Parallel& parallel) {
  std::vector<int32_t> experts(p.experts, p.experts + p.tokens * p.top_k);
  for (int32_t& e : experts) e = std::clamp(e, 0, static_cast<int32_t>(p.num_experts) - 1);
  MoeSortParams clamped = p;
  clamped.experts = experts.data();
  cpu::portable::moe_sort(clamped, parallel);
}

}  // namespace

// Several CTAs, in some of whose warps 32 pairs follow 32 others, and ids outside; more experts than a CTA has threads;
// a table that is too large for shared memory.
RACE_CASE(moe_sort) {
  struct Call {
    const char* label;
    int64_t tokens, top_k, num_experts;
  };
  for (const Call& c : {Call{"small", 110, 30, 11}, {"many experts", 5, 2, 1500}, {"more experts", 5, 2, 25000}}) {
    const int64_t n = c.tokens * c.top_k;
    const Tensor experts =
        integers(n, [&](int64_t i) { return i % 29 == 5 ? (i - 63) * 30000000 : i % 7 * 37 % c.num_experts; });
    Tensor offsets = integers(c.num_experts + 1), row_of = integers(n), token_of = integers(n);
    MoeSortParams p{c.tokens,
                    c.top_k,
                    c.num_experts,
                    experts.as<int32_t>(),
                    offsets.as<int32_t>(),
                    row_of.as<int32_t>(),
                    token_of.as<int32_t>(),
                    nullptr};
    const Tensor memory(DType::i8, cuda::moe_sort_workspace(p, kDevice));
    p.workspace = memory.data();
    check(c.label, cuda::moe_sort, sort_clamped, p,
          {{"offsets", offsets, false, kExact},
           {"row_of", row_of, false, kExact},
           {"token_of", token_of, false, kExact}});
  }
}

namespace {

constexpr int64_t kTokens = 9, kTopK = 3, kRows = kTokens * kTopK, kDims[] = {72, 37};

Tensor permutation() {
  return integers(kRows, [](int64_t i) { return i * 5 % kRows; });
}

}  // namespace

RACE_CASE(moe_scatter) {
  const Tensor row_of = permutation();
  for (DType dtype : kFloats)
    for (int64_t dim : kDims)
      for (bool backward : {false, true}) {
        const Tensor x = random_normal(dtype, kTokens * dim), y = random_normal(dtype, kRows * dim),
                     weights = random_uniform(DType::f32, kRows, 0, 1);
        Tensor sorted(dtype, kRows * dim), dweights(DType::f32, backward ? kRows : 0);
        const MoeScatterParams p{dtype,
                                 kTokens,
                                 kTopK,
                                 dim,
                                 x.data(),
                                 dim,
                                 row_of.as<int32_t>(),
                                 backward ? weights.as<float>() : nullptr,
                                 sorted.data(),
                                 backward ? y.data() : nullptr,
                                 dim,
                                 dweights.as<float>()};
        check(name(dtype), BOTH(moe_scatter), p, {{"sorted", sorted}, {"dweights", dweights}});
      }
}

RACE_CASE(moe_gather) {
  const Tensor row_of = permutation();
  for (DType dtype : kFloats)
    for (int64_t dim : kDims)
      for (bool weighted : {false, true}) {
        const Tensor sorted = random_normal(dtype, kRows * dim), weights = random_uniform(DType::f32, kRows, 0, 1);
        Tensor out(dtype, kTokens * dim);
        const MoeGatherParams p{dtype,
                                kTokens,
                                kTopK,
                                dim,
                                sorted.data(),
                                dim,
                                row_of.as<int32_t>(),
                                weighted ? weights.as<float>() : nullptr,
                                out.data()};
        check(name(dtype), BOTH(moe_gather), p, {{"out", out}});
      }
}
