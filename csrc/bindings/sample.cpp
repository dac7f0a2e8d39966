#include "llmcore/sample.h"

#include <cmath>

#include "common.h"

namespace llmcore {
namespace {

// A float32 value per row, dense. On the CPU each must be `good`.
template <class Good>
Tensor float_per_row(const Tensor& t, const Tensor& logits, const std::string& what, const char* accepted,
                     const Good& good) {
  check_device(t, logits, what.c_str());
  check_dtype(t, ScalarType::Float, what.c_str());
  check_shape(t, {logits.size(0)}, what.c_str());
  const Tensor result = dense(t);
  if (!result.is_cpu()) return result;
  const float* values = static_cast<const float*>(result.const_data_ptr());
  for (int64_t row = 0; row < result.numel(); ++row)
    LLMCORE_CHECK(good(values[row]), what, "[", row, "] is ", values[row], "; accepted: ", accepted);
  return result;
}

// Likewise an int64 value, from int32 or int64.
template <class Good>
Tensor index_per_row(const Tensor& t, const Tensor& logits, const std::string& what, const std::string& accepted,
                     const Good& good) {
  check_device(t, logits, what.c_str());
  check_shape(t, {logits.size(0)}, what.c_str());
  const Tensor result = indices(t, what.c_str());
  if (!result.is_cpu()) return result;
  const IndexValues values = values_of(result);
  for (int64_t row = 0; row < values.size; ++row)
    LLMCORE_CHECK(good(values[row]), what, "[", row, "] is ", values[row], "; accepted: ", accepted);
  return result;
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
const int64_t* ints(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }

std::tuple<Tensor, Tensor> sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                                  const Tensor& top_p, const Tensor& min_p, const Tensor& seeds,
                                  const Tensor& positions) {
  const DType dtype = float_dtype(logits, "sample: logits");
  check_dim(logits, 2, "sample: logits", "(rows, vocab)");
  const int64_t vocab = logits.size(1);
  LLMCORE_CHECK(vocab >= 1 && vocab <= kMaxSampleVocab, "sample: the vocabulary has ", vocab,
                " tokens; accepted: 1 to ", kMaxSampleVocab);
  const auto any = [](int64_t) { return true; };
  const Tensor t = float_per_row(temperature, logits, "sample: temperature", "0 (greedy) or above",
                                 [](float x) { return x >= 0 && std::isfinite(x); });
  const Tensor k = index_per_row(top_k, logits, "sample: top_k", "0 (off) or above", [](int64_t x) { return x >= 0; });
  const Tensor p =
      float_per_row(top_p, logits, "sample: top_p", "above 0, to 1 (off)", [](float x) { return x > 0 && x <= 1; });
  const Tensor m =
      float_per_row(min_p, logits, "sample: min_p", "0 (off) to 1", [](float x) { return x >= 0 && x <= 1; });
  const Tensor s = index_per_row(seeds, logits, "sample: seeds", "any", any);
  const Tensor at = index_per_row(positions, logits, "sample: positions", "any", any);
  const Rows rows = as_rows(logits);
  Tensor tokens = empty(logits, {rows.rows}, ScalarType::Long);
  Tensor logprobs = empty(logits, {rows.rows}, ScalarType::Float);
  const SampleParams params{dtype,
                            rows.rows,
                            vocab,
                            rows.tensor.const_data_ptr(),
                            rows.stride,
                            floats(t),
                            ints(k),
                            floats(p),
                            floats(m),
                            ints(s),
                            ints(at),
                            static_cast<int64_t*>(tokens.mutable_data_ptr()),
                            static_cast<float*>(logprobs.mutable_data_ptr())};
  LLMCORE_RUN(sample, logits, params);
  if (tokens.is_cpu())
    for (int64_t row = 0; row < rows.rows; ++row)
      LLMCORE_CHECK(values_of(tokens)[row] >= 0, "sample: the logits of row ", row,
                    " hold NaN or +inf, or are all -inf; accepted: finite logits, and -inf beside a finite one");
  return {tokens, logprobs};
}

void apply_penalties_(const Tensor& logits, const Tensor& tokens, const Tensor& prompt_lens, const Tensor& repetition,
                      const Tensor& presence, const Tensor& frequency) {
  const DType dtype = float_dtype(logits, "apply_penalties_: logits");
  check_dim(logits, 2, "apply_penalties_: logits", "(rows, vocab)");
  check_writable(logits, "apply_penalties_: logits");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_dim(tokens, 2, "apply_penalties_: tokens", "(rows, max_len)");
  const int64_t max_len = tokens.size(1);
  check_device(tokens, logits, "apply_penalties_: tokens");
  check_shape(tokens, {rows, max_len}, "apply_penalties_: tokens");
  const Tensor ids = indices(tokens, "apply_penalties_: tokens");
  if (ids.is_cpu())
    for (int64_t i = 0; i < ids.numel(); ++i)
      LLMCORE_CHECK(values_of(ids)[i] >= -1 && values_of(ids)[i] < vocab, "apply_penalties_: tokens[", i / max_len,
                    ", ", i % max_len, "] is ", values_of(ids)[i], "; accepted: 0 to ", vocab - 1,
                    ", or -1 for padding");
  const Tensor lens =
      index_per_row(prompt_lens, logits, "apply_penalties_: prompt_lens", "0 to max_len = " + std::to_string(max_len),
                    [&](int64_t x) { return x >= 0 && x <= max_len; });
  const auto finite = [](float x) { return std::isfinite(x); };
  const Tensor r = float_per_row(repetition, logits, "apply_penalties_: repetition", "above 0",
                                 [](float x) { return x > 0 && std::isfinite(x); });
  const Tensor p = float_per_row(presence, logits, "apply_penalties_: presence", "finite", finite);
  const Tensor f = float_per_row(frequency, logits, "apply_penalties_: frequency", "finite", finite);
  const ApplyPenaltiesParams params{dtype,
                                    rows,
                                    vocab,
                                    logits.mutable_data_ptr(),
                                    rows > 1 ? logits.stride(0) : vocab,
                                    max_len,
                                    ints(ids),
                                    ints(lens),
                                    floats(r),
                                    floats(p),
                                    floats(f)};
  if (rows > 0 && vocab > 0) LLMCORE_RUN(apply_penalties, logits, params);
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("apply_penalties_", TORCH_BOX(&apply_penalties_));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
