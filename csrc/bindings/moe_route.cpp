#include "llmcore/moe_route.h"

#include <cmath>

#include "common.h"

namespace llmcore {
namespace {

using Routing = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

float* float_data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
int32_t* int_data(const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }
const float* data_or_null(const OptTensor& t) { return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr; }

Tensor checked_bias(const Tensor& bias, const Tensor& logits) {
  check_device(bias, logits, "moe_route: bias");
  check_dtype(bias, ScalarType::Float, "moe_route: bias");
  check_shape(bias, {logits.size(1)}, "moe_route: bias");
  const Tensor b = dense(bias);
  if (!b.is_cpu()) return b;
  const float* values = static_cast<const float*>(b.const_data_ptr());
  for (int64_t e = 0; e < b.numel(); ++e)
    LLMCORE_CHECK(std::isfinite(values[e]), "moe_route: bias[", e, "] is ", values[e], "; it must be finite");
  return b;
}

Routing moe_route(const Tensor& logits, int64_t top_k, bool sigmoid, const OptTensor& bias, int64_t num_groups,
                  int64_t topk_groups, bool renormalize, double scale) {
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
  LLMCORE_CHECK(tokens * top_k <= INT32_MAX, "moe_route: ", tokens, " tokens x ", top_k, " experts are ",
                tokens * top_k, " rows; at most 2147483647 can be addressed");
  OptTensor b;
  if (bias) b = checked_bias(*bias, logits);
  const Rows rows = as_rows(logits);
  Tensor weights = empty(logits, {tokens, top_k}, ScalarType::Float);
  Tensor experts = empty(logits, {tokens, top_k}, ScalarType::Int);
  Tensor scores = empty(logits, {tokens, num_experts}, ScalarType::Float);
  Tensor offsets = empty(logits, {num_experts + 1}, ScalarType::Int);
  Tensor row_of = empty(logits, {tokens, top_k}, ScalarType::Int);
  Tensor token_of = empty(logits, {tokens * top_k}, ScalarType::Int);
  const int64_t threads = logits.is_cpu() ? torch_parallel().threads : 0;
  const Tensor scratch = empty(logits, {threads, 2 * num_experts + num_groups}, ScalarType::Float);
  std::vector<int64_t> bad_token(threads, -1);
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
                   data_or_null(b),
                   float_data(weights),
                   int_data(experts),
                   float_data(scores),
                   int_data(offsets),
                   int_data(row_of),
                   int_data(token_of),
                   bad_token.data(),
                   float_data(scratch),
                   nullptr};
  LLMCORE_RUN_WITH_WORKSPACE(moe_route_forward, logits, p);
  int64_t bad = -1;
  for (int64_t t : bad_token)
    if (t >= 0 && (bad < 0 || t < bad)) bad = t;
  LLMCORE_CHECK(bad < 0, "moe_route: the logits of token ", bad,
                sigmoid ? " hold NaN; accepted: any number"
                        : " hold NaN or +inf, or are all -inf; accepted: finite logits, and -inf beside a finite one");
  return {weights, experts, scores, offsets, row_of, token_of};
}

// A float32 gradient of the given shape, or none.
OptTensor checked_gradient(const OptTensor& t, const Tensor& scores, int64_t columns, const char* what) {
  if (!t) return std::nullopt;
  check_device(*t, scores, what);
  check_dtype(*t, ScalarType::Float, what);
  check_shape(*t, {scores.size(0), columns}, what);
  return dense(*t);
}

Tensor moe_route_backward(const OptTensor& dweights, const OptTensor& dscores, const Tensor& scores,
                          const Tensor& experts, bool sigmoid, bool renormalize, double scale) {
  check_dtype(scores, ScalarType::Float, "moe_route_backward: scores");
  check_dim(scores, 2, "moe_route_backward: scores", "(tokens, num_experts)");
  const int64_t tokens = scores.size(0), num_experts = scores.size(1);
  LLMCORE_CHECK(num_experts >= 1, "moe_route_backward: scores has shape ", shape_text(scores));
  check_device(experts, scores, "moe_route_backward: experts");
  check_dtype(experts, ScalarType::Int, "moe_route_backward: experts");
  check_dim(experts, 2, "moe_route_backward: experts", "(tokens, top_k)");
  const int64_t top_k = experts.size(1);
  check_shape(experts, {tokens, top_k}, "moe_route_backward: experts");
  const Tensor s = dense(scores), e = dense(experts);
  const int32_t* ids = static_cast<const int32_t*>(e.const_data_ptr());
  if (e.is_cpu())
    for (int64_t i = 0; i < tokens * top_k; ++i)
      LLMCORE_CHECK(ids[i] >= 0 && ids[i] < num_experts, "moe_route_backward: experts[", i / top_k, ", ", i % top_k,
                    "] is ", ids[i], "; accepted: 0 to ", num_experts - 1);
  const OptTensor dw = checked_gradient(dweights, s, top_k, "moe_route_backward: dweights");
  const OptTensor ds = checked_gradient(dscores, s, num_experts, "moe_route_backward: dscores");
  Tensor dlogits = empty(scores, {tokens, num_experts});
  const MoeRouteBackwardParams p{tokens,
                                 num_experts,
                                 top_k,
                                 sigmoid,
                                 renormalize,
                                 static_cast<float>(scale),
                                 data_or_null(dw),
                                 data_or_null(ds),
                                 static_cast<const float*>(s.const_data_ptr()),
                                 ids,
                                 float_data(dlogits)};
  LLMCORE_RUN(moe_route_backward, scores, p);
  return dlogits;
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
