#include "llmcore/moe_route.h"

#include <cmath>

#include "common.h"

namespace llmcore {
namespace {

std::tuple<Tensor, Tensor, Tensor> moe_route(const Tensor& logits, int64_t top_k, bool sigmoid, const OptTensor& bias,
                                             int64_t num_groups, int64_t topk_groups, bool renormalize, double scale) {
  const DType dtype = float_dtype(logits, "moe_route: logits");
  check_dim(logits, 2, "moe_route: logits", "(tokens, num_experts)");
  const int64_t tokens = logits.size(0), num_experts = logits.size(1);
  LLMCORE_CHECK(num_experts >= 1, "moe_route: logits has shape ", shape_text(logits), "; there must be an expert");
  LLMCORE_CHECK(num_groups >= 1 && num_experts % num_groups == 0, "moe_route: num_groups is ", num_groups,
                "; it must divide the number of experts, ", num_experts);
  LLMCORE_CHECK(topk_groups >= 1 && topk_groups <= num_groups, "moe_route: topk_groups is ", topk_groups,
                "; accepted: 1 to num_groups (", num_groups, ")");
  LLMCORE_CHECK(std::isfinite(scale), "moe_route: scale is ", scale, "; it must be finite");
  const int64_t candidates = num_experts / num_groups * topk_groups;
  LLMCORE_CHECK(top_k >= 1 && top_k <= candidates, "moe_route: top_k is ", top_k, "; accepted: 1 to ", candidates,
                ", the number of experts in the chosen groups");
  OptTensor b;
  if (bias) {
    check_cpu(*bias, "moe_route: bias");
    check_dtype(*bias, ScalarType::Float, "moe_route: bias");
    check_shape(*bias, {num_experts}, "moe_route: bias");
    b = dense(*bias);
    const float* values = static_cast<const float*>(b->const_data_ptr());
    for (int64_t e = 0; e < num_experts; ++e)
      LLMCORE_CHECK(std::isfinite(values[e]), "moe_route: bias[", e, "] is ", values[e], "; it must be finite");
  }
  const Rows rows = as_rows(logits);
  const Parallel par = torch_parallel();
  Tensor weights = empty(logits, {tokens, top_k}, ScalarType::Float);
  Tensor experts = empty(logits, {tokens, top_k}, ScalarType::Int);
  Tensor scores = empty(logits, {tokens, num_experts}, ScalarType::Float);
  Tensor scratch = empty(logits, {par.threads, 2 * num_experts + num_groups}, ScalarType::Float);
  std::vector<int64_t> bad_token(par.threads, -1);
  MoeRouteParams p{dtype,
                   tokens,
                   num_experts,
                   top_k,
                   num_groups,
                   topk_groups,
                   sigmoid,
                   renormalize,
                   sigmoid || bias.has_value(),
                   static_cast<float>(scale),
                   rows.tensor.const_data_ptr(),
                   rows.stride,
                   b ? static_cast<const float*>(b->const_data_ptr()) : nullptr,
                   static_cast<float*>(weights.mutable_data_ptr()),
                   static_cast<int32_t*>(experts.mutable_data_ptr()),
                   static_cast<float*>(scores.mutable_data_ptr()),
                   static_cast<float*>(scratch.mutable_data_ptr()),
                   bad_token.data()};
  cpu::moe_route_forward(p, par);
  int64_t bad = -1;
  for (int64_t t : bad_token)
    if (t >= 0 && (bad < 0 || t < bad)) bad = t;
  LLMCORE_CHECK(bad < 0, "moe_route: the logits of token ", bad,
                sigmoid ? " hold NaN; accepted: any number"
                        : " hold NaN or +inf, or are all -inf; accepted: finite logits, and -inf beside a finite one");
  return {weights, experts, scores};
}

Tensor moe_route_backward(const OptTensor& dweights, const OptTensor& dscores, const Tensor& scores,
                          const Tensor& experts, bool sigmoid, bool renormalize, double scale) {
  check_cpu(scores, "moe_route_backward: scores");
  check_dtype(scores, ScalarType::Float, "moe_route_backward: scores");
  check_dim(scores, 2, "moe_route_backward: scores", "(tokens, num_experts)");
  const int64_t tokens = scores.size(0), num_experts = scores.size(1);
  LLMCORE_CHECK(num_experts >= 1, "moe_route_backward: scores has shape ", shape_text(scores));
  check_cpu(experts, "moe_route_backward: experts");
  check_dtype(experts, ScalarType::Int, "moe_route_backward: experts");
  check_dim(experts, 2, "moe_route_backward: experts", "(tokens, top_k)");
  const int64_t top_k = experts.size(1);
  check_shape(experts, {tokens, top_k}, "moe_route_backward: experts");
  const Tensor s = dense(scores), e = dense(experts);
  const int32_t* ids = static_cast<const int32_t*>(e.const_data_ptr());
  for (int64_t i = 0; i < tokens * top_k; ++i)
    LLMCORE_CHECK(ids[i] >= 0 && ids[i] < num_experts, "moe_route_backward: experts[", i / top_k, ", ", i % top_k,
                  "] is ", ids[i], "; accepted: 0 to ", num_experts - 1);
  OptTensor dw, ds;
  if (dweights) {
    check_cpu(*dweights, "moe_route_backward: dweights");
    check_dtype(*dweights, ScalarType::Float, "moe_route_backward: dweights");
    check_shape(*dweights, {tokens, top_k}, "moe_route_backward: dweights");
    dw = dense(*dweights);
  }
  if (dscores) {
    check_cpu(*dscores, "moe_route_backward: dscores");
    check_dtype(*dscores, ScalarType::Float, "moe_route_backward: dscores");
    check_shape(*dscores, {tokens, num_experts}, "moe_route_backward: dscores");
    ds = dense(*dscores);
  }
  Tensor dlogits = empty(scores, {tokens, num_experts});
  MoeRouteBackwardParams p{tokens,
                           num_experts,
                           top_k,
                           sigmoid,
                           renormalize,
                           static_cast<float>(scale),
                           dw ? static_cast<const float*>(dw->const_data_ptr()) : nullptr,
                           ds ? static_cast<const float*>(ds->const_data_ptr()) : nullptr,
                           static_cast<const float*>(s.const_data_ptr()),
                           ids,
                           static_cast<float*>(dlogits.mutable_data_ptr())};
  cpu::moe_route_backward(p, torch_parallel());
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
}

}  // namespace llmcore
