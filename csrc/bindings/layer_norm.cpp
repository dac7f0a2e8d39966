#include "llmcore/layer_norm.h"

#include "common.h"

namespace llmcore {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                                      const OptTensor& residual, double eps) {
  const DType dtype = float_dtype(x, "layer_norm: x");
  const Rows rows = as_rows(x);
  LLMCORE_CHECK(rows.dim >= 1, "layer_norm: x has shape ", shape_text(x), "; the last dimension must not be empty");
  LLMCORE_CHECK(eps >= 0, "layer_norm: eps is ", eps, "; it must not be negative");
  check_like(weight, x, {rows.dim}, "layer_norm: weight", "x");
  if (bias) check_like(*bias, x, {rows.dim}, "layer_norm: bias", "x");
  Rows res{x, 0, 0, 0};
  if (residual) {
    check_same_shape(*residual, x, "layer_norm: residual", "x");
    res = as_rows(*residual);
  }
  const Tensor w = dense(weight), b = bias ? dense(*bias) : weight;
  Tensor y = empty_same_shape(x), z = residual ? empty_same_shape(x) : empty(x, {0});
  Tensor mean = empty(x, {rows.rows}, ScalarType::Float), rstd = empty(x, {rows.rows}, ScalarType::Float);
  LayerNormParams p{dtype,
                    rows.rows,
                    rows.dim,
                    static_cast<float>(eps),
                    rows.tensor.const_data_ptr(),
                    rows.stride,
                    residual ? res.tensor.const_data_ptr() : nullptr,
                    res.stride,
                    w.const_data_ptr(),
                    bias ? b.const_data_ptr() : nullptr,
                    y.mutable_data_ptr(),
                    residual ? z.mutable_data_ptr() : nullptr,
                    static_cast<float*>(mean.mutable_data_ptr()),
                    static_cast<float*>(rstd.mutable_data_ptr())};
  cpu::layer_norm_forward(p, torch_parallel());
  return {y, z, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const OptTensor& dz, const Tensor& z,
                                                       const Tensor& weight, const Tensor& mean, const Tensor& rstd,
                                                       bool has_bias) {
  const DType dtype = float_dtype(z, "layer_norm_backward: z");
  const Rows z_rows = as_rows(z);
  LLMCORE_CHECK(z_rows.dim >= 1, "layer_norm_backward: z has shape ", shape_text(z),
                "; the last dimension must not be empty");
  check_same_shape(dy, z, "layer_norm_backward: dy", "z");
  if (dz) check_same_shape(*dz, z, "layer_norm_backward: dz", "z");
  check_like(weight, z, {z_rows.dim}, "layer_norm_backward: weight", "z");
  for (const Tensor* t : {&mean, &rstd}) {
    const char* what = t == &mean ? "layer_norm_backward: mean" : "layer_norm_backward: rstd";
    check_cpu(*t, what);
    check_dtype(*t, ScalarType::Float, what);
    check_shape(*t, {z_rows.rows}, what);
  }
  const Rows dy_rows = as_rows(dy), dz_rows = dz ? as_rows(*dz) : Rows{z, 0, 0, 0};
  const Tensor w = dense(weight), m = dense(mean), r = dense(rstd);
  const Parallel par = torch_parallel();
  Tensor dx = empty_same_shape(z), dweight = zeros(z, {par.threads, z_rows.dim}, ScalarType::Float);
  Tensor dbias = zeros(z, {par.threads, has_bias ? z_rows.dim : 0}, ScalarType::Float);
  LayerNormBackwardParams p{dtype,
                            z_rows.rows,
                            z_rows.dim,
                            dy_rows.tensor.const_data_ptr(),
                            dy_rows.stride,
                            dz ? dz_rows.tensor.const_data_ptr() : nullptr,
                            dz_rows.stride,
                            z_rows.tensor.const_data_ptr(),
                            z_rows.stride,
                            w.const_data_ptr(),
                            static_cast<const float*>(m.const_data_ptr()),
                            static_cast<const float*>(r.const_data_ptr()),
                            dx.mutable_data_ptr(),
                            static_cast<float*>(dweight.mutable_data_ptr()),
                            has_bias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr};
  cpu::layer_norm_backward(p, par);
  return {dx, sum_partials(dweight, weight.scalar_type()), sum_partials(dbias, weight.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace llmcore
