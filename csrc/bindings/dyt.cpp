#include "llmcore/dyt.h"

#include "common.h"

namespace llmcore {
namespace {

void check_alpha(const Tensor& alpha, const Tensor& x, const char* what) {
  check_device(alpha, x, what);
  check_same_dtype(alpha, x, what, "x");
  LLMCORE_CHECK(alpha.numel() == 1, what, " has shape ", shape_text(alpha), "; expected one element");
}

// (partials, *alpha's shape)
Tensor zeros_per_partial(const Tensor& alpha, int64_t partials) {
  std::vector<int64_t> shape{partials};
  for (int64_t d = 0; d < alpha.dim(); ++d) shape.push_back(1);
  return torch::stable::new_zeros(alpha, {shape.data(), shape.size()}, ScalarType::Double);
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
  if (rows.dim > 0) LLMCORE_RUN(dyt_forward, x, p);
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
  Tensor dx = empty_same_shape(x), dalpha = zeros_per_partial(alpha, partials);
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
  if (rows.dim > 0) LLMCORE_RUN(dyt_backward, x, p);
  return {dx, sum_partials(dalpha, alpha.scalar_type()), sum_partials(dweight, weight.scalar_type()),
          sum_partials(dbias, weight.scalar_type())};
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("dyt", TORCH_BOX(&dyt));
  m.impl("dyt_backward", TORCH_BOX(&dyt_backward));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
