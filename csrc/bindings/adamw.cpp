#include "llmcore/adamw.h"

#include <cmath>

#include "common.h"

namespace llmcore {
namespace {

using Tensors = std::vector<Tensor>;

struct Lists {
  const Tensors &weights, &masters, &grads, &exp_avgs, &exp_avg_sqs, &steps;
};

// "adamw_: exp_avgs[3]"
std::string name_of(const char* list, size_t i) {
  return std::string("adamw_: ") + list + "[" + std::to_string(i) + "]";
}

void check_length(const Tensors& list, const Tensors& weights, const char* what) {
  LLMCORE_CHECK(list.size() == weights.size(), "adamw_: ", what, " holds ", list.size(), " tensors, but weights holds ",
                weights.size(), "; they must be equal");
}

// Whether `t` is as large as `weight`, of `dtype`, and one run of memory, as the kernels walk all lists alike. Without
// the texts that a message needs: there are thousands of tensors.
bool fits(const Tensor& t, const Tensor& weight, ScalarType dtype) {
  bool same = t.scalar_type() == dtype && t.is_cpu() == weight.is_cpu() && t.get_device() == weight.get_device() &&
              t.dim() == weight.dim() && t.is_contiguous();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == weight.size(d);
  return same;
}

void check_flat(const Tensors& list, size_t i, const Tensor& weight, ScalarType dtype, const char* list_name) {
  if (fits(list[i], weight, dtype)) return;
  const std::string what = name_of(list_name, i);
  check_device(list[i], weight, what.c_str());
  check_dtype(list[i], dtype, what.c_str());
  LLMCORE_CHECK(list[i].is_contiguous(), what, " is not contiguous; every tensor of adamw_ must be");
  fail(what, " has shape ", shape_text(list[i]), ", but weights[", i, "] has ", shape_text(weight),
       "; they must be equal");
}

// One float32 number on the weights' device.
void check_number(const Tensor& t, const Tensor& weight, const char* what) {
  if (t.scalar_type() == ScalarType::Float && t.is_cpu() == weight.is_cpu() && t.get_device() == weight.get_device() &&
      t.numel() == 1)
    return;
  check_device(t, weight, what);
  check_dtype(t, ScalarType::Float, what);
  LLMCORE_CHECK(t.numel() == 1, what, " has shape ", shape_text(t), "; expected one element");
}

void check_lists(const Lists& l) {
  const ScalarType weight_dtype = l.weights[0].scalar_type();
  const bool own_masters = weight_dtype != ScalarType::Float;
  float_dtype(l.weights[0], "adamw_: weights[0]");
  LLMCORE_CHECK(own_masters || l.masters.empty(), "adamw_: masters holds ", l.masters.size(),
                " tensors, but float32 weights are their own masters; expected an empty list");
  if (own_masters) check_length(l.masters, l.weights, "masters");
  check_length(l.grads, l.weights, "grads");
  check_length(l.exp_avgs, l.weights, "exp_avgs");
  check_length(l.exp_avg_sqs, l.weights, "exp_avg_sqs");
  check_length(l.steps, l.weights, "steps");
  const ScalarType grad_dtype = l.grads[0].scalar_type();
  LLMCORE_CHECK(grad_dtype == ScalarType::Float || grad_dtype == weight_dtype, "adamw_: grads[0] has dtype ",
                dtype_name(grad_dtype), "; accepted: float32 and the weights' ", dtype_name(weight_dtype));
  for (size_t i = 0; i < l.weights.size(); ++i) {
    const Tensor& weight = l.weights[i];
    LLMCORE_CHECK(weight.is_cpu() == l.weights[0].is_cpu() && weight.get_device() == l.weights[0].get_device(),
                  "adamw_: weights[", i, "] and weights[0] are on two devices; all must be on one device");
    check_flat(l.weights, i, weight, weight_dtype, "weights");
    if (own_masters) check_flat(l.masters, i, weight, ScalarType::Float, "masters");
    check_flat(l.grads, i, weight, grad_dtype, "grads");
    check_flat(l.exp_avgs, i, weight, ScalarType::Float, "exp_avgs");
    check_flat(l.exp_avg_sqs, i, weight, ScalarType::Float, "exp_avg_sqs");
    check_number(l.steps[i], weight, "adamw_: a step");
  }
}

void check_scalars(const AdamwParams& p) {
  const auto check = [](bool ok, const char* what, double value, const char* accepted) {
    LLMCORE_CHECK(ok, "adamw_: ", what, " is ", value, "; accepted: ", accepted);
  };
  check(std::isfinite(p.lr) && p.lr >= 0, "lr", p.lr, "0 or more");
  check(p.beta1 >= 0 && p.beta1 < 1, "beta1", p.beta1, "0 to below 1");
  check(p.beta2 >= 0 && p.beta2 < 1, "beta2", p.beta2, "0 to below 1");
  check(std::isfinite(p.eps) && p.eps >= 0, "eps", p.eps, "0 or more");
  check(std::isfinite(p.weight_decay) && p.weight_decay >= 0, "weight_decay", p.weight_decay, "0 or more");
  check(std::isfinite(p.divisor) && p.divisor > 0, "divisor", p.divisor, "a number above 0");
  check(std::isfinite(p.max_norm) && p.max_norm >= 0, "max_norm", p.max_norm, "0 or more");
  check(p.max_norm == 0 || p.norm, "max_norm", p.max_norm, "0 without a norm");
}

std::vector<AdamwTensor> listed(const Lists& l) {
  std::vector<AdamwTensor> list;
  const auto floats = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  int64_t tiles = 0;
  for (size_t i = 0; i < l.weights.size(); ++i) {
    const bool own_master = !l.masters.empty();
    const int64_t size = l.weights[i].numel();
    list.push_back({size, tiles, own_master ? l.weights[i].mutable_data_ptr() : nullptr,
                    floats(own_master ? l.masters[i] : l.weights[i]), l.grads[i].const_data_ptr(),
                    floats(l.exp_avgs[i]), floats(l.exp_avg_sqs[i]), floats(l.steps[i])});
    tiles += (size + kAdamwTile - 1) / kAdamwTile;
  }
  return list;
}

void adamw_(Tensors weights, Tensors masters, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps,
            OptTensor norm, OptTensor lr_tensor, double lr, double beta1, double beta2, double eps, double weight_decay,
            double divisor, double max_norm) {
  LLMCORE_CHECK(!weights.empty(), "adamw_: the list of weights is empty; accepted: one or more");
  const Lists lists{weights, masters, grads, exp_avgs, exp_avg_sqs, steps};
  check_lists(lists);
  if (norm) check_number(*norm, weights[0], "adamw_: norm");
  if (lr_tensor) check_number(*lr_tensor, weights[0], "adamw_: lr");
  const std::vector<AdamwTensor> list = listed(lists);
  const int64_t count = static_cast<int64_t>(list.size());
  const Tensor factors = empty(weights[0], {count, 4}, ScalarType::Float);
  const auto number = [](const OptTensor& t) { return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr; };
  const AdamwParams p{float_dtype(weights[0], "adamw_: weights[0]"),
                      float_dtype(grads[0], "adamw_: grads[0]"),
                      count,
                      list.back().first_tile + (list.back().size + kAdamwTile - 1) / kAdamwTile,
                      list.data(),
                      static_cast<AdamwFactors*>(factors.mutable_data_ptr()),
                      number(norm),
                      number(lr_tensor),
                      lr,
                      beta1,
                      beta2,
                      eps,
                      weight_decay,
                      divisor,
                      max_norm};
  check_scalars(p);
  LLMCORE_RUN(adamw, weights[0], p);
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("adamw_", TORCH_BOX(&adamw_));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
