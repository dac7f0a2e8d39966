#include "llmcore/rms_norm.h"

#include "common.h"

namespace llmcore {
namespace {

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, const OptTensor& residual,
                                            double eps) {
  const DType dtype = float_dtype(x, "rms_norm: x");
  const Rows rows = as_rows(x);
  LLMCORE_CHECK(rows.dim >= 1, "rms_norm: x has shape ", shape_text(x), "; the last dimension must not be empty");
  check_cpu(weight, "rms_norm: weight");
  check_same_dtype(weight, x, "rms_norm: weight", "x");
  check_shape(weight, {rows.dim}, "rms_norm: weight");
  LLMCORE_CHECK(eps >= 0, "rms_norm: eps is ", eps, "; it must not be negative");
  const Tensor w = dense(weight);
  Rows res{x, 0, 0, 0};
  if (residual) {
    check_cpu(*residual, "rms_norm: residual");
    check_same_dtype(*residual, x, "rms_norm: residual", "x");
    LLMCORE_CHECK(shape_text(*residual) == shape_text(x), "rms_norm: residual has shape ", shape_text(*residual),
                  ", but x has ", shape_text(x), "; they must be equal");
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
  const Rows z_rows = as_rows(z), dy_rows = as_rows(dy);
  check_same_dtype(dy, z, "rms_norm_backward: dy", "z");
  LLMCORE_CHECK(shape_text(dy) == shape_text(z), "rms_norm_backward: dy has shape ", shape_text(dy), ", but z has ",
                shape_text(z));
  check_same_dtype(weight, z, "rms_norm_backward: weight", "z");
  check_shape(weight, {z_rows.dim}, "rms_norm_backward: weight");
  check_dtype(rstd, ScalarType::Float, "rms_norm_backward: rstd");
  check_shape(rstd, {z_rows.rows}, "rms_norm_backward: rstd");
  Rows dz_rows{z, 0, 0, 0};
  if (dz) {
    check_same_dtype(*dz, z, "rms_norm_backward: dz", "z");
    LLMCORE_CHECK(shape_text(*dz) == shape_text(z), "rms_norm_backward: dz has shape ", shape_text(*dz), ", but z has ",
                  shape_text(z));
    dz_rows = as_rows(*dz);
  }
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
