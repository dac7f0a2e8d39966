#include "llmcore/dyt.h"

#include "common.h"

namespace llmcore {
namespace {

void check_alpha(const Tensor& alpha, const Tensor& x, const char* what) {
  check_cpu(alpha, what);
  check_same_dtype(alpha, x, what, "x");
  LLMCORE_CHECK(alpha.numel() == 1, what, " has shape ", shape_text(alpha), "; expected one element");
}

Tensor dyt(const Tensor& x, const Tensor& alpha, const Tensor& weight, const OptTensor& bias) {
  const DType dtype = float_dtype(x, "dyt: x");
  const Rows rows = as_rows(x);
  check_alpha(alpha, x, "dyt: alpha");
  check_like(weight, x, {rows.dim}, "dyt: weight", "x");
  if (bias) check_like(*bias, x, {rows.dim}, "dyt: bias", "x");
  const Tensor w = dense(weight), b = bias ? dense(*bias) : weight;
  Tensor y = empty_same_shape(x);
  DytParams p{dtype,
              rows.rows,
              rows.dim,
              rows.tensor.const_data_ptr(),
              rows.stride,
              alpha.const_data_ptr(),
              w.const_data_ptr(),
              bias ? b.const_data_ptr() : nullptr,
              y.mutable_data_ptr()};
  if (rows.dim > 0) cpu::dyt_forward(p, torch_parallel());
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dyt_backward(const Tensor& dy, const Tensor& x, const Tensor& alpha,
                                                        const Tensor& weight, bool has_bias) {
  const DType dtype = float_dtype(x, "dyt_backward: x");
  const Rows rows = as_rows(x);
  check_alpha(alpha, x, "dyt_backward: alpha");
  check_like(weight, x, {rows.dim}, "dyt_backward: weight", "x");
  check_same_shape(dy, x, "dyt_backward: dy", "x");
  const Rows dy_rows = as_rows(dy);
  const Tensor w = dense(weight);
  const int64_t partials = num_partials(rows.rows);
  Tensor dx = empty_same_shape(x), dalpha = zeros(x, {partials}, ScalarType::Double);
  Tensor dweight = zeros(x, {partials, rows.dim}, ScalarType::Float);
  Tensor dbias = zeros(x, {partials, has_bias ? rows.dim : 0}, ScalarType::Float);
  DytBackwardParams p{dtype,
                      rows.rows,
                      rows.dim,
                      dy_rows.tensor.const_data_ptr(),
                      dy_rows.stride,
                      rows.tensor.const_data_ptr(),
                      rows.stride,
                      alpha.const_data_ptr(),
                      w.const_data_ptr(),
                      dx.mutable_data_ptr(),
                      static_cast<double*>(dalpha.mutable_data_ptr()),
                      static_cast<float*>(dweight.mutable_data_ptr()),
                      has_bias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr};
  if (rows.dim > 0) cpu::dyt_backward(p, torch_parallel());
  double total = 0;
  for (int64_t i = 0; i < partials; ++i) total += p.dalpha_partial[i];
  Tensor alpha_gradient = empty_same_shape(alpha);
  torch::stable::fill_(alpha_gradient, total);
  return {dx, alpha_gradient, sum_partials(dweight, weight.scalar_type()), sum_partials(dbias, weight.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("dyt", TORCH_BOX(&dyt));
  m.impl("dyt_backward", TORCH_BOX(&dyt_backward));
}

}  // namespace llmcore
