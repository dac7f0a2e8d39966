// The router of a mixture-of-experts layer: scores, group-limited top-k choice, combination weights, and the rows of a
// stable sort of the choices by expert (moe_permute.h).
#pragma once
#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

// scores = softmax or sigmoid of logits; the top_k experts by scores + bias, among the topk_groups best of num_groups
// equal groups; weights = the chosen scores, over their sum when `renormalize`, times scale.
struct MoeRouteParams {
  DType dtype;  // of logits
  int64_t tokens, num_experts, top_k;
  int64_t num_groups, topk_groups;  // num_groups divides num_experts; topk_groups of them hold >= top_k experts
  bool sigmoid, renormalize;
  bool group_top2;  // a group is worth the sum of its two best experts, else its best one
  float scale;
  const void* logits;  // (tokens, num_experts)
  int64_t logits_stride;
  const float* bias;  // (num_experts), finite, or null
  float* weights;     // (tokens, top_k)
  int32_t* experts;   // (tokens, top_k), best first
  float* scores;      // (tokens, num_experts)
  int32_t* offsets;   // (num_experts + 1), row_of (tokens, top_k) and token_of (tokens * top_k): as in MoeSortParams
  int32_t* row_of;
  int32_t* token_of;
  // A token whose scores are not numbers. CPU: it is reported, and nothing is sorted. CUDA: its experts are 0 to
  // top_k - 1, its weights NaN.
  int64_t* bad_token;  // CPU: (threads), preset to -1, per worker; CUDA: null
  float* scratch;      // CPU: (threads, 2 * num_experts + num_groups); CUDA: null
  void* workspace;     // CUDA: moe_route_forward_workspace() bytes, aligned to 16; CPU: null
};

struct MoeRouteBackwardParams {
  int64_t tokens, num_experts, top_k;
  bool sigmoid, renormalize;
  float scale;
  const float* dweights;   // (tokens, top_k) or null
  const float* dscores;    // (tokens, num_experts) or null
  const float* scores;     // (tokens, num_experts)
  const int32_t* experts;  // (tokens, top_k)
  float* dlogits;          // (tokens, num_experts)
};

LLMCORE_CPU_KERNEL(moe_route_forward, MoeRouteParams)
LLMCORE_CPU_KERNEL(moe_route_backward, MoeRouteBackwardParams)

LLMCORE_CUDA_KERNEL(moe_route_forward, MoeRouteParams)
LLMCORE_CUDA_KERNEL(moe_route_backward, MoeRouteBackwardParams)

namespace cuda {
int64_t moe_route_forward_workspace(const MoeRouteParams& p, const Device& device);
}

}  // namespace llmcore
