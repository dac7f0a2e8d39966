#include "llmcore/linear_cross_entropy.h"

#include <cmath>

#include "common.h"

namespace llmcore {
namespace {

// The checked arguments that all three ops share, with what keeps the pointers of `params` alive.
struct Call {
  LinearCrossEntropyParams params{};
  Rows hidden, weight;
  Tensor targets;
  std::vector<int64_t> tokens;  // those that are not ignored
  int64_t all;                  // tokens, ignored ones included
};

// Everything but the values of the targets, which the host cannot see where they are on a CUDA device.
void check_call(const std::string& op, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                double softcap, double z_loss, double label_smoothing) {
  const auto name = [&](const char* argument) { return op + ": " + argument; };
  float_dtype(hidden, name("hidden").c_str());
  LLMCORE_CHECK(hidden.dim() >= 1 && hidden.size(-1) >= 1, op, ": hidden has shape ", shape_text(hidden),
                "; expected (..., dim) with dim >= 1");
  const int64_t dim = hidden.size(-1);
  check_device(weight, hidden, name("weight").c_str());
  check_same_dtype(weight, hidden, name("weight").c_str(), "hidden");
  check_dim(weight, 2, name("weight").c_str(), "(vocab, dim)");
  LLMCORE_CHECK(weight.size(0) >= 1 && weight.size(1) == dim, op, ": weight has shape ", shape_text(weight),
                "; expected (vocab, ", dim, ") with vocab >= 1");
  check_device(targets, hidden, name("targets").c_str());
  check_dtype(targets, ScalarType::Long, name("targets").c_str());
  bool match = targets.dim() == hidden.dim() - 1;
  for (int64_t d = 0; match && d < targets.dim(); ++d) match = targets.size(d) == hidden.size(d);
  LLMCORE_CHECK(match, op, ": targets has shape ", shape_text(targets), ", but hidden has ", shape_text(hidden),
                "; expected hidden's shape without its last dimension");
  check_softcap(softcap, op);
  LLMCORE_CHECK(std::isfinite(z_loss), op, ": z_loss is ", z_loss, "; it must be finite");
  LLMCORE_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, ": label_smoothing is ", label_smoothing,
                "; accepted: 0 to 1");
}

// One float per token.
void check_per_token(const Tensor& t, const Tensor& hidden, int64_t tokens, const std::string& what) {
  check_device(t, hidden, what.c_str());
  check_dtype(t, ScalarType::Float, what.c_str());
  check_shape(t, {tokens}, what.c_str());
}

Call checked(const std::string& op, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
             int64_t ignore_index, double softcap, double z_loss, double label_smoothing) {
  check_call(op, hidden, weight, targets, softcap, z_loss, label_smoothing);
  const int64_t vocab = weight.size(0);
  Call call{{}, as_rows(hidden), as_rows(weight), dense(targets), {}, targets.numel()};
  const int64_t* ids = static_cast<const int64_t*>(call.targets.const_data_ptr());
  call.tokens.reserve(call.all);
  for (int64_t t = 0; t < call.all; ++t) {
    if (ids[t] == ignore_index) continue;
    LLMCORE_CHECK(ids[t] >= 0 && ids[t] < vocab, op, ": targets[", t, "] is ", ids[t], "; accepted: 0 to ", vocab - 1,
                  ", or ", ignore_index, " to ignore the token");
    call.tokens.push_back(t);
  }
  LinearCrossEntropyParams& p = call.params;
  p.dtype = float_dtype(hidden, "hidden");
  p.count = static_cast<int64_t>(call.tokens.size());
  p.tokens = call.tokens.data();
  p.dim = hidden.size(-1);
  p.vocab = vocab;
  p.softcap = static_cast<float>(softcap);
  p.z_loss = static_cast<float>(z_loss);
  p.label_smoothing = static_cast<float>(label_smoothing);
  p.hidden = call.hidden.tensor.const_data_ptr();
  p.hidden_stride = call.hidden.stride;
  p.weight = call.weight.tensor.const_data_ptr();
  p.weight_stride = call.weight.stride;
  p.targets = ids;
  return call;
}

// (dhidden, dweight) to be written by the kernel, 0 where it writes nothing; empty when not needed.
std::tuple<Tensor, Tensor> gradients(Call& call, const Tensor& hidden, const Tensor& weight, bool need_dhidden,
                                     bool need_dweight) {
  LinearCrossEntropyParams& p = call.params;
  Tensor dhidden = need_dhidden ? empty_same_shape(hidden) : empty(hidden, {0});
  Tensor dweight = need_dweight ? empty_same_shape(weight) : empty(weight, {0});
  if (need_dhidden && p.count < call.all) torch::stable::zero_(dhidden);
  if (need_dweight && p.count == 0) torch::stable::zero_(dweight);
  p.dhidden = need_dhidden ? dhidden.mutable_data_ptr() : nullptr;
  p.dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr;
  return {dhidden, dweight};
}

std::tuple<Tensor, Tensor> linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                int64_t ignore_index, double softcap, double z_loss,
                                                double label_smoothing) {
  Call call = checked("linear_cross_entropy", hidden, weight, targets, ignore_index, softcap, z_loss, label_smoothing);
  Tensor loss = zeros(hidden, {call.all}, ScalarType::Float), lse = zeros(hidden, {call.all}, ScalarType::Float);
  call.params.loss = static_cast<float*>(loss.mutable_data_ptr());
  call.params.lse = static_cast<float*>(lse.mutable_data_ptr());
  cpu::linear_cross_entropy(call.params, torch_parallel());
  return {loss, lse};
}

std::tuple<Tensor, Tensor> linear_cross_entropy_backward(const Tensor& dloss, const Tensor& hidden,
                                                         const Tensor& weight, const Tensor& targets, const Tensor& lse,
                                                         int64_t ignore_index, double softcap, double z_loss,
                                                         double label_smoothing, bool need_dhidden, bool need_dweight) {
  Call call =
      checked("linear_cross_entropy_backward", hidden, weight, targets, ignore_index, softcap, z_loss, label_smoothing);
  check_per_token(dloss, hidden, call.all, "linear_cross_entropy_backward: dloss");
  check_per_token(lse, hidden, call.all, "linear_cross_entropy_backward: lse");
  const Tensor d = dense(dloss), l = dense(lse);
  auto results = gradients(call, hidden, weight, need_dhidden, need_dweight);
  call.params.dloss = static_cast<const float*>(d.const_data_ptr());
  call.params.lse = const_cast<float*>(static_cast<const float*>(l.const_data_ptr()));  // read only: there is no loss
  if (need_dhidden || need_dweight) cpu::linear_cross_entropy(call.params, torch_parallel());
  return results;
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_with_grad(const Tensor& hidden, const Tensor& weight,
                                                                  const Tensor& targets, int64_t ignore_index,
                                                                  double softcap, double z_loss, double label_smoothing,
                                                                  bool mean, bool need_dhidden, bool need_dweight) {
  Call call = checked("linear_cross_entropy_with_grad", hidden, weight, targets, ignore_index, softcap, z_loss,
                      label_smoothing);
  Tensor losses = zeros(hidden, {call.all}, ScalarType::Float), lse = empty(hidden, {call.all}, ScalarType::Float);
  auto [dhidden, dweight] = gradients(call, hidden, weight, need_dhidden, need_dweight);
  const float divisor = mean && call.params.count > 0 ? static_cast<float>(call.params.count) : 1.f;
  call.params.loss = static_cast<float*>(losses.mutable_data_ptr());
  call.params.lse = static_cast<float*>(lse.mutable_data_ptr());
  call.params.dloss_of_all = 1.f / divisor;
  cpu::linear_cross_entropy(call.params, torch_parallel());
  Tensor loss = sum_partials(losses, ScalarType::Float);
  *static_cast<float*>(loss.mutable_data_ptr()) /= divisor;
  return {loss, dhidden, dweight};
}

// The checks of the three ops for llmcore/ops/linear_cross_entropy_cuda.py, which takes their place on CUDA devices.
void linear_cross_entropy_check(const std::string& op, const Tensor& hidden, const Tensor& weight,
                                const Tensor& targets, const OptTensor& dloss, const OptTensor& lse, double softcap,
                                double z_loss, double label_smoothing) {
  check_call(op, hidden, weight, targets, softcap, z_loss, label_smoothing);
  if (dloss) check_per_token(*dloss, hidden, targets.numel(), op + ": dloss");
  if (lse) check_per_token(*lse, hidden, targets.numel(), op + ": lse");
}

template <class Library>
void register_checks(Library& m) {
  m.impl("linear_cross_entropy_check", TORCH_BOX(&linear_cross_entropy_check));
}

}  // namespace

LLMCORE_REGISTER(register_checks)

STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
  m.impl("linear_cross_entropy_with_grad", TORCH_BOX(&linear_cross_entropy_with_grad));
}

}  // namespace llmcore
