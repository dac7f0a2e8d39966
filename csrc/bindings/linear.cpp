#include "llmcore/linear.h"

#include "common.h"

namespace llmcore {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  const DType dtype = float_dtype(x, "linear: x");
  check_device(weight, x, "linear: weight");
  check_same_dtype(weight, x, "linear: weight", "x");
  check_dim(weight, 2, "linear: weight", "(n, k)");
  LLMCORE_CHECK(x.dim() >= 1, "linear: x is a scalar; expected (..., k)");
  const int64_t n = weight.size(0), k = weight.size(1);
  LLMCORE_CHECK(x.size(-1) == k, "linear: x has shape ", shape_text(x), ", but weight has shape ", shape_text(weight),
                "; their last dimensions must be equal");
  int64_t rows = 1;
  std::vector<int64_t> shape(x.dim(), n);
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= shape[d] = x.size(d);
  LLMCORE_CHECK(rows <= kLinearRows, "linear: x has ", rows, " rows; the kernel accepts at most ", kLinearRows);
  if (bias) check_like(*bias, x, {n}, "linear: bias", "x");
  const Rows x_rows = as_rows(x), w = as_rows(weight);
  const OptTensor b = bias ? OptTensor(dense(*bias)) : std::nullopt;
  Tensor y = empty(x, shape);
  const LinearParams p{dtype,
                       rows,
                       n,
                       k,
                       x_rows.tensor.const_data_ptr(),
                       x_rows.stride,
                       w.tensor.const_data_ptr(),
                       w.stride,
                       b ? b->const_data_ptr() : nullptr,
                       y.mutable_data_ptr()};
  cpu::linear(p, torch_parallel());
  return y;
}

}  // namespace

// On CUDA the product is torch's (llmcore/ops/linear.py).
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace llmcore
