#include "llmcore/cross_entropy.h"

#include "common.h"
#include "llmcore/device_errors.h"

namespace llmcore {
namespace {

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

void check_rows(const Tensor& t, const Tensor& logits, ScalarType dtype, const char* what) {
  check_device(t, logits, what);
  check_dtype(t, dtype, what);
  check_shape(t, {logits.size(0)}, what);
  LLMCORE_CHECK(t.is_contiguous(), what, " is not contiguous; expected one element after the other");
}

// logits (rows, vocab) float32, whose rows start at multiples of 32 bytes; loss and lse (rows,) float32, loss missing
// where lse is given; dloss (rows,) or (1,) float32, missing where no gradient is wanted. The gradient, in the dtype of
// that name, replaces the logits, from the start of each row.
void cross_entropy_chunk(const Tensor& logits, const Tensor& targets, const OptTensor& loss, const Tensor& lse,
                         const OptTensor& dloss, int64_t first, int64_t ignore_index, double softcap, double z_loss,
                         double label_smoothing, const std::string& gradient) {
  check_dim(logits, 2, "cross_entropy_chunk_: logits", "(rows, vocab)");
  check_dtype(logits, ScalarType::Float, "cross_entropy_chunk_: logits");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  LLMCORE_CHECK(vocab >= 1 && logits.stride(1) == 1 && logits.stride(0) % 8 == 0 && logits.stride(0) >= vocab &&
                    reinterpret_cast<uintptr_t>(logits.const_data_ptr()) % 16 == 0,
                "cross_entropy_chunk_: logits has shape ", shape_text(logits), " and strides (", logits.stride(0), ", ",
                logits.stride(1),
                "); expected vocab >= 1 and rows a multiple of 8 elements apart, aligned to 16 bytes");
  check_rows(targets, logits, ScalarType::Long, "cross_entropy_chunk_: targets");
  if (loss) check_rows(*loss, logits, ScalarType::Float, "cross_entropy_chunk_: loss");
  check_rows(lse, logits, ScalarType::Float, "cross_entropy_chunk_: lse");
  if (dloss) {
    check_device(*dloss, logits, "cross_entropy_chunk_: dloss");
    check_dtype(*dloss, ScalarType::Float, "cross_entropy_chunk_: dloss");
    LLMCORE_CHECK(dloss->dim() == 1 && (dloss->size(0) == 1 || dloss->size(0) == rows) && dloss->is_contiguous(),
                  "cross_entropy_chunk_: dloss has shape ", shape_text(*dloss), "; expected (", rows, ",) or (1,)");
  }
  const bool f32 = gradient == "float32", bf16 = gradient == "bfloat16";
  LLMCORE_CHECK(f32 || bf16 || gradient == "float16", "cross_entropy_chunk_: gradient is '", gradient,
                "'; accepted: float32, bfloat16, float16");
  const CrossEntropyChunkParams p{f32    ? DType::f32
                                  : bf16 ? DType::bf16
                                         : DType::f16,
                                  rows,
                                  vocab,
                                  logits.stride(0),
                                  first,
                                  ignore_index,
                                  static_cast<float>(softcap),
                                  static_cast<float>(z_loss),
                                  static_cast<float>(label_smoothing),
                                  floats(logits),
                                  static_cast<const int64_t*>(targets.const_data_ptr()),
                                  loss ? floats(*loss) : nullptr,
                                  floats(lse),
                                  dloss ? floats(*dloss) : nullptr,
                                  dloss && dloss->size(0) > 1 ? 1 : 0};
  LLMCORE_RUN(cross_entropy_chunk, logits, p);
}

void take_device_errors(const Tensor& out) {
  check_dtype(out, ScalarType::Long, "take_device_errors_: out");
  check_shape(out, {TakeDeviceErrorsParams::kKinds, TakeDeviceErrorsParams::kFields}, "take_device_errors_: out");
  check_writable(out, "take_device_errors_: out");
  LLMCORE_CHECK(out.is_contiguous(), "take_device_errors_: out is not contiguous");
  const TakeDeviceErrorsParams p{static_cast<int64_t*>(out.mutable_data_ptr())};
  LLMCORE_RUN(take_device_errors, out, p);
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("cross_entropy_chunk_", TORCH_BOX(&cross_entropy_chunk));
  m.impl("take_device_errors_", TORCH_BOX(&take_device_errors));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
