#include "llmcore/moe_route.h"

#include "moe.h"

using namespace llmcore;
using namespace races;

// In registers and in memory, with groups and without; several CTAs, some of whose warps have two tokens.
RACE_CASE(moe_route_forward) {
  struct Call {
    const char* label;
    DType dtype;
    int64_t tokens, num_experts, top_k, num_groups, topk_groups;
    bool sigmoid, with_bias;
  };
  for (const Call& c : {Call{"softmax", DType::bf16, 110, 40, 3, 1, 1, false, false},
                        Call{"groups and bias", DType::f32, 110, 64, 4, 8, 3, true, true},
                        Call{"in memory", DType::f16, 110, 72, 33, 6, 3, false, true}}) {
    const int64_t rows = c.tokens * c.top_k;
    const Tensor logits = random_normal(c.dtype, c.tokens * c.num_experts),
                 bias = random_normal(DType::f32, c.num_experts), scratch(DType::f32, 2 * c.num_experts + c.num_groups);
    Tensor weights(DType::f32, rows), experts = integers(rows), scores(DType::f32, c.tokens * c.num_experts),
                                      offsets = integers(c.num_experts + 1), row_of = integers(rows),
                                      token_of = integers(rows);
    int64_t bad_token = -1;
    MoeRouteParams p{c.dtype,
                     c.tokens,
                     c.num_experts,
                     c.top_k,
                     c.num_groups,
                     c.topk_groups,
                     c.sigmoid,
                     true,
                     c.sigmoid || c.with_bias,
                     2.5f,
                     logits.data(),
                     c.num_experts,
                     c.with_bias ? bias.as<float>() : nullptr,
                     weights.as<float>(),
                     experts.as<int32_t>(),
                     scores.as<float>(),
                     offsets.as<int32_t>(),
                     row_of.as<int32_t>(),
                     token_of.as<int32_t>(),
                     &bad_token,
                     scratch.as<float>(),
                     nullptr};
    const Tensor memory(DType::i8, cuda::moe_route_forward_workspace(p, kDevice));
    p.workspace = memory.data();
    check(c.label, BOTH(moe_route_forward), p,
          {{"weights", weights},
           {"experts", experts, false, kExact},
           {"scores", scores},
           {"offsets", offsets, false, kExact},
           {"row_of", row_of, false, kExact},
           {"token_of", token_of, false, kExact}});
  }
}

RACE_CASE(moe_route_backward) {
  constexpr int64_t kTokens = 19, kExperts = 40, kTopK = 3;
  const Tensor experts = integers(kTokens * kTopK, [](int64_t i) { return i / kTopK % 5 + 7 * (i % kTopK); }),
               scores = random_uniform(DType::f32, kTokens * kExperts, 0.1, 0.9),
               dweights = random_normal(DType::f32, kTokens * kTopK),
               dscores = random_normal(DType::f32, kTokens * kExperts);
  for (bool sigmoid : {false, true})
    for (bool renormalize : {false, true}) {
      Tensor dlogits(DType::f32, kTokens * kExperts);
      const MoeRouteBackwardParams p{kTokens,
                                     kExperts,
                                     kTopK,
                                     sigmoid,
                                     renormalize,
                                     2.5f,
                                     dweights.as<float>(),
                                     sigmoid == renormalize ? dscores.as<float>() : nullptr,
                                     scores.as<float>(),
                                     experts.as<int32_t>(),
                                     dlogits.as<float>()};
      check(sigmoid ? "sigmoid" : "softmax", BOTH(moe_route_backward), p, {{"dlogits", dlogits}});
    }
}
