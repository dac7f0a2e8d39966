#include "llmcore/grouped_gemm.h"

#include "common.h"

namespace llmcore {
namespace {

Tensor expert_offsets(const Tensor& offsets, int64_t num_experts, int64_t rows, const char* what) {
  check_shape(offsets, {num_experts + 1}, what);
  return checked_offsets(offsets, offsets, rows, what, "x_sorted");
}

// weight (num_experts, n, k), walked by its strides when n or k is contiguous.
Tensor checked_weight(const Tensor& weight, const Tensor& like, const std::string& what) {
  check_cpu(weight, what.c_str());
  check_same_dtype(weight, like, what.c_str(), "x_sorted");
  check_dim(weight, 3, what.c_str(), "(num_experts, n, k)");
  LLMCORE_CHECK(weight.size(0) >= 1, what, " has shape ", shape_text(weight), "; there must be an expert");
  return weight.stride(1) == 1 || weight.stride(2) == 1 ? weight : torch::stable::contiguous(weight);
}

Tensor grouped_gemm(const Tensor& x_sorted, const Tensor& weight, const Tensor& offsets) {
  const DType dtype = float_dtype(x_sorted, "grouped_gemm: x_sorted");
  check_dim(x_sorted, 2, "grouped_gemm: x_sorted", "(rows, k)");
  const Tensor w = checked_weight(weight, x_sorted, "grouped_gemm: weight");
  const int64_t rows = x_sorted.size(0), num_experts = w.size(0), n = w.size(1), k = w.size(2);
  LLMCORE_CHECK(x_sorted.size(1) == k, "grouped_gemm: x_sorted has shape ", shape_text(x_sorted),
                ", but weight has shape ", shape_text(weight), "; their last dimensions must be equal");
  const Tensor o = expert_offsets(offsets, num_experts, rows, "grouped_gemm: offsets");
  const Rows x = as_rows(x_sorted);
  Tensor y = empty(x_sorted, {rows, n});
  cpu::grouped_gemm({dtype, num_experts, n, k, x.tensor.const_data_ptr(), x.stride, w.const_data_ptr(), w.stride(0),
                     w.stride(2), w.stride(1), static_cast<const int32_t*>(o.const_data_ptr()), y.mutable_data_ptr()},
                    torch_parallel());
  return y;
}

std::tuple<Tensor, Tensor> grouped_gemm_backward(const Tensor& dy, const Tensor& x_sorted, const Tensor& weight,
                                                 const Tensor& offsets, bool need_dx, bool need_dweight) {
  const DType dtype = float_dtype(x_sorted, "grouped_gemm_backward: x_sorted");
  check_dim(x_sorted, 2, "grouped_gemm_backward: x_sorted", "(rows, k)");
  const Tensor w = checked_weight(weight, x_sorted, "grouped_gemm_backward: weight");
  const int64_t rows = x_sorted.size(0), num_experts = w.size(0), n = w.size(1), k = w.size(2);
  check_shape(x_sorted, {rows, k}, "grouped_gemm_backward: x_sorted");
  check_cpu(dy, "grouped_gemm_backward: dy");
  check_same_dtype(dy, x_sorted, "grouped_gemm_backward: dy", "x_sorted");
  check_shape(dy, {rows, n}, "grouped_gemm_backward: dy");
  const Tensor o = expert_offsets(offsets, num_experts, rows, "grouped_gemm_backward: offsets");
  const int32_t* ends = static_cast<const int32_t*>(o.const_data_ptr());
  const Rows x = as_rows(x_sorted), d = as_rows(dy);
  const Parallel par = torch_parallel();
  Tensor dx = need_dx ? empty(x_sorted, {rows, k}) : empty(x_sorted, {0});
  Tensor dweight = need_dweight ? empty(weight, {num_experts, n, k}) : empty(weight, {0});
  if (need_dx)
    cpu::grouped_gemm({dtype, num_experts, k, n, d.tensor.const_data_ptr(), d.stride, w.const_data_ptr(), w.stride(0),
                       w.stride(1), w.stride(2), ends, dx.mutable_data_ptr()},
                      par);
  if (need_dweight)
    cpu::grouped_gemm_weight_grad({dtype, num_experts, n, k, d.tensor.const_data_ptr(), d.stride,
                                   x.tensor.const_data_ptr(), x.stride, ends, dweight.mutable_data_ptr()},
                                  par);
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) {
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("grouped_gemm_backward", TORCH_BOX(&grouped_gemm_backward));
}

}  // namespace llmcore
