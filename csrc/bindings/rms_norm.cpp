#include "llmcore/rms_norm.h"

#include "common.h"

namespace llmcore {
namespace {

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, const OptTensor& residual,
                                            double eps) {
  const DType dtype = float_dtype(x, "rms_norm: x");
  const Rows rows = as_rows(x);
  LLMCORE_CHECK(rows.dim >= 1, "rms_norm: x has shape ", shape_text(x), "; the last dimension must not be empty");
  check_like(weight, x, {rows.dim}, "rms_norm: weight", "x");
  LLMCORE_CHECK(eps >= 0, "rms_norm: eps is ", eps, "; it must not be negative");
  const Tensor w = dense(weight);
  Rows res{x, 0, 0, 0};
  if (residual) {
    check_same_shape(*residual, x, "rms_norm: residual", "x");
    res = as_rows(*residual);
  }
  Tensor y = empty_same_shape(x), rstd = empty(x, {rows.rows}, ScalarType::Float);
  Tensor z = residual ? empty_same_shape(x) : empty(x, {0});
  RmsNormParams p{dtype,
                  rows.rows,
                  rows.dim,
                  static_cast<float>(eps),
                  rows.tensor.const_data_ptr(),
                  rows.stride,
                  residual ? res.tensor.const_data_ptr() : nullptr,
                  res.stride,
                  w.const_data_ptr(),
                  y.mutable_data_ptr(),
                  residual ? z.mutable_data_ptr() : nullptr,
                  static_cast<float*>(rstd.mutable_data_ptr())};
  cpu::rms_norm_forward(p, torch_parallel());
  return {y, z, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const OptTensor& dz, const Tensor& z,
                                             const Tensor& weight, const Tensor& rstd) {
  const DType dtype = float_dtype(z, "rms_norm_backward: z");
  const Rows z_rows = as_rows(z);
  check_same_shape(dy, z, "rms_norm_backward: dy", "z");
  if (dz) check_same_shape(*dz, z, "rms_norm_backward: dz", "z");
  check_like(weight, z, {z_rows.dim}, "rms_norm_backward: weight", "z");
  check_cpu(rstd, "rms_norm_backward: rstd");
  check_dtype(rstd, ScalarType::Float, "rms_norm_backward: rstd");
  check_shape(rstd, {z_rows.rows}, "rms_norm_backward: rstd");
  const Rows dy_rows = as_rows(dy), dz_rows = dz ? as_rows(*dz) : Rows{z, 0, 0, 0};
  const Tensor w = dense(weight), r = dense(rstd);
  const Parallel par = torch_parallel();
  Tensor dx = empty_same_shape(z), partial = zeros(z, {par.threads, z_rows.dim}, ScalarType::Float);
  RmsNormBackwardParams p{dtype,
                          z_rows.rows,
                          z_rows.dim,
                          dy_rows.tensor.const_data_ptr(),
                          dy_rows.stride,
                          dz ? dz_rows.tensor.const_data_ptr() : nullptr,
                          dz_rows.stride,
                          z_rows.tensor.const_data_ptr(),
                          z_rows.stride,
                          w.const_data_ptr(),
                          static_cast<const float*>(r.const_data_ptr()),
                          dx.mutable_data_ptr(),
                          static_cast<float*>(partial.mutable_data_ptr())};
  cpu::rms_norm_backward(p, par);
  return {dx, sum_partials(partial, weight.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace llmcore
