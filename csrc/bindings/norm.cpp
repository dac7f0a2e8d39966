// rms_norm and layer_norm: one description of a call serves both. RMS has no mean and no bias.
#include "llmcore/norm.h"

#include "common.h"

namespace llmcore {
namespace {

template <class Params>
using Run = void (*)(const Tensor& like, const Params&);

void run_rms_norm(const Tensor& like, const NormParams& p) { LLMCORE_RUN(rms_norm_forward, like, p); }
void run_layer_norm(const Tensor& like, const NormParams& p) { LLMCORE_RUN(layer_norm_forward, like, p); }
void run_rms_norm_backward(const Tensor& like, const NormBackwardParams& p) { LLMCORE_RUN(rms_norm_backward, like, p); }
void run_layer_norm_backward(const Tensor& like, const NormBackwardParams& p) {
  LLMCORE_RUN(layer_norm_backward, like, p);
}

float* float_data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// (y, z, mean, rstd); z is empty without a residual, mean when the norm is not `centred`
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const std::string& op, Run<NormParams> run, bool centred,
                                                   const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                                   const OptTensor& residual, double eps) {
  const DType dtype = float_dtype(x, (op + ": x").c_str());
  const Rows rows = as_rows(x);
  LLMCORE_CHECK(rows.dim >= 1, op, ": x has shape ", shape_text(x), "; the last dimension must not be empty");
  LLMCORE_CHECK(eps >= 0, op, ": eps is ", eps, "; it must not be negative");
  check_like(weight, x, {rows.dim}, (op + ": weight").c_str(), "x");
  if (bias) check_like(*bias, x, {rows.dim}, (op + ": bias").c_str(), "x");
  if (residual) check_same_shape(*residual, x, (op + ": residual").c_str(), "x");
  const Rows res = residual ? as_rows(*residual) : Rows{x, 0, 0, 0};
  const Tensor w = dense(weight), b = bias ? dense(*bias) : weight;
  Tensor y = empty_same_shape(x), z = residual ? empty_same_shape(x) : empty(x, {0});
  Tensor mean = empty(x, {centred ? rows.rows : 0}, ScalarType::Float), rstd = empty(x, {rows.rows}, ScalarType::Float);
  run(x, {dtype, rows.rows, rows.dim, static_cast<float>(eps), rows.tensor.const_data_ptr(), rows.stride,
          residual ? res.tensor.const_data_ptr() : nullptr, res.stride, w.const_data_ptr(),
          bias ? b.const_data_ptr() : nullptr, y.mutable_data_ptr(), residual ? z.mutable_data_ptr() : nullptr,
          centred ? float_data(mean) : nullptr, float_data(rstd)});
  return {y, z, mean, rstd};
}

// (dx, dweight, dbias); dbias is empty without a bias
std::tuple<Tensor, Tensor, Tensor> backward(const std::string& op, Run<NormBackwardParams> run, const Tensor& dy,
                                            const OptTensor& dz, const Tensor& z, const Tensor& weight,
                                            const OptTensor& mean, const Tensor& rstd, bool has_bias) {
  const DType dtype = float_dtype(z, (op + ": z").c_str());
  const Rows z_rows = as_rows(z);
  LLMCORE_CHECK(z_rows.dim >= 1, op, ": z has shape ", shape_text(z), "; the last dimension must not be empty");
  check_same_shape(dy, z, (op + ": dy").c_str(), "z");
  if (dz) check_same_shape(*dz, z, (op + ": dz").c_str(), "z");
  check_like(weight, z, {z_rows.dim}, (op + ": weight").c_str(), "z");
  const auto statistic = [&](const Tensor& t, const std::string& what) {
    check_device(t, z, what.c_str());
    check_dtype(t, ScalarType::Float, what.c_str());
    check_shape(t, {z_rows.rows}, what.c_str());
    return dense(t);
  };
  const Tensor r = statistic(rstd, op + ": rstd"), m = mean ? statistic(*mean, op + ": mean") : rstd;
  const Rows dy_rows = as_rows(dy), dz_rows = dz ? as_rows(*dz) : Rows{z, 0, 0, 0};
  const Tensor w = dense(weight);
  const int64_t partials = num_partials(z_rows.rows);
  Tensor dx = empty_same_shape(z), dweight = zeros(z, {partials, z_rows.dim}, ScalarType::Float);
  Tensor dbias = has_bias ? zeros(z, {partials, z_rows.dim}, ScalarType::Float) : empty(weight, {0});
  run(z, {dtype, z_rows.rows, z_rows.dim, dy_rows.tensor.const_data_ptr(), dy_rows.stride,
          dz ? dz_rows.tensor.const_data_ptr() : nullptr, dz_rows.stride, z_rows.tensor.const_data_ptr(), z_rows.stride,
          w.const_data_ptr(), mean ? static_cast<const float*>(m.const_data_ptr()) : nullptr,
          static_cast<const float*>(r.const_data_ptr()), dx.mutable_data_ptr(), float_data(dweight),
          has_bias ? float_data(dbias) : nullptr});
  return {dx, sum_partials(dweight, weight.scalar_type()),
          has_bias ? sum_partials(dbias, weight.scalar_type()) : dbias};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, const OptTensor& residual,
                                            double eps) {
  auto [y, z, mean, rstd] = forward("rms_norm", run_rms_norm, false, x, weight, std::nullopt, residual, eps);
  return {y, z, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const OptTensor& dz, const Tensor& z,
                                             const Tensor& weight, const Tensor& rstd) {
  auto [dx, dweight, dbias] =
      backward("rms_norm_backward", run_rms_norm_backward, dy, dz, z, weight, std::nullopt, rstd, false);
  return {dx, dweight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                                      const OptTensor& residual, double eps) {
  return forward("layer_norm", run_layer_norm, true, x, weight, bias, residual, eps);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const OptTensor& dz, const Tensor& z,
                                                       const Tensor& weight, const Tensor& mean, const Tensor& rstd,
                                                       bool has_bias) {
  return backward("layer_norm_backward", run_layer_norm_backward, dy, dz, z, weight, mean, rstd, has_bias);
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
