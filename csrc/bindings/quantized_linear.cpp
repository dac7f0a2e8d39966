#include "llmcore/quantized_linear.h"

#include "common.h"
#include "quant_format.h"

namespace llmcore {
QuantFormat quant_format(const std::string& name, const char* op) {
  for (int i = 0; i < kQuantFormats; ++i)
    if (name == kQuantLayouts[i].name) return static_cast<QuantFormat>(i);
  std::ostringstream names;
  for (int i = 0; i < kQuantFormats; ++i) names << (i ? ", " : "") << kQuantLayouts[i].name;
  fail(op, ": quantised format '", name, "'; accepted: ", names.str());
}

namespace {

const QuantLayout& layout_of(QuantFormat format) { return kQuantLayouts[static_cast<int>(format)]; }

// Of a packed matrix (n, k), or of one for each expert, dense.
Tensor checked_weight(const Tensor& packed, const Tensor& like, QuantFormat format, int64_t n, int64_t k,
                      const std::string& op, std::optional<int64_t> num_experts = std::nullopt) {
  const QuantLayout& f = layout_of(format);
  check_device(packed, like, (op + ": packed").c_str());
  LLMCORE_CHECK(n >= 0 && k >= 0, op, ": a matrix (", n, ", ", k, "); accepted: sizes from 0 on");
  LLMCORE_CHECK(k % f.block == 0, op, ": rows have ", k, " weights; accepted of ", f.name, ": multiples of ", f.block);
  const int64_t bytes = (n + kQuantPanel - 1) / kQuantPanel * quant_panel_bytes(f, k);
  const bool fits = num_experts ? packed.dim() == 2 && packed.size(0) == *num_experts && packed.size(1) == bytes
                                : packed.dim() == 1 && packed.size(0) == bytes;
  std::ostringstream expected;
  num_experts ? expected << *num_experts << ", " << bytes : expected << bytes << ",";
  LLMCORE_CHECK(packed.scalar_type() == ScalarType::Byte && fits, op, ": packed has shape ", shape_text(packed),
                " and dtype ", dtype_name(packed.scalar_type()), "; expected (", expected.str(), ") uint8, ", f.name,
                " of (", n, ", ", k, ")");
  return dense(packed);
}

// y: (x's rows, n), its rows y_stride elements apart.
void multiply(const Tensor& x, const Tensor& packed, const std::string& format, const OptTensor& bias, Tensor& y,
              int64_t n, int64_t y_stride, const std::string& op) {
  const DType dtype = float_dtype(x, (op + ": x").c_str());
  const QuantFormat f = quant_format(format, op.c_str());
  const int64_t k = x.size(-1);
  const Tensor weight = checked_weight(packed, x, f, n, k, op);
  if (bias) check_like(*bias, x, {n}, (op + ": bias").c_str(), "x");
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  const Rows x_rows = as_rows(x);
  const OptTensor b = bias ? OptTensor(dense(*bias)) : std::nullopt;
  const QuantizedLinearParams p{dtype,
                                f,
                                rows,
                                n,
                                k,
                                x_rows.tensor.const_data_ptr(),
                                x_rows.stride,
                                static_cast<const uint8_t*>(weight.const_data_ptr()),
                                b ? b->const_data_ptr() : nullptr,
                                y.mutable_data_ptr(),
                                y_stride};
  LLMCORE_RUN(quantized_linear, x, p);
}

Tensor quantized_linear(const Tensor& x, const Tensor& packed, const std::string& format, int64_t out_features,
                        const OptTensor& bias) {
  LLMCORE_CHECK(x.dim() >= 1, "quantized_linear: x is a scalar; expected (..., k)");
  LLMCORE_CHECK(out_features >= 0, "quantized_linear: out_features is ", out_features, "; accepted: 0 or more");
  std::vector<int64_t> shape(x.dim(), out_features);
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape[d] = x.size(d);
  Tensor y = empty(x, shape);
  multiply(x, packed, format, bias, y, out_features, out_features, "quantized_linear");
  return y;
}

void quantized_linear_(Tensor y, const Tensor& x, const Tensor& packed, const std::string& format,
                       const OptTensor& bias) {
  LLMCORE_CHECK(x.dim() >= 1, "quantized_linear_: x is a scalar; expected (..., k)");
  check_device(y, x, "quantized_linear_: y");
  check_same_dtype(y, x, "quantized_linear_: y", "x");
  bool fits = y.dim() == x.dim();
  for (int64_t d = 0; fits && d + 1 < x.dim(); ++d) fits = y.size(d) == x.size(d);
  LLMCORE_CHECK(fits, "quantized_linear_: y has shape ", shape_text(y), ", but x has shape ", shape_text(x),
                "; all but their last dimensions must be equal");
  check_writable(y, "quantized_linear_: y");
  const std::optional<int64_t> stride = row_stride(y);
  LLMCORE_CHECK(stride, "quantized_linear_: the rows of y do not lie at one distance from each other");
  multiply(x, packed, format, bias, y, y.size(-1), *stride, "quantized_linear_");
}

// On a CUDA device nobody looks at the tokens: they are the caller's word.
Tensor checked_tokens(const Tensor& token_of, const Tensor& x) {
  const std::string name = "quantized_grouped_linear: token_of";
  check_device(token_of, x, name.c_str());
  check_dtype(token_of, ScalarType::Int, name.c_str());
  check_dim(token_of, 1, name.c_str(), "(rows,)");
  const Tensor tokens = dense(token_of);
  const int32_t* values = static_cast<const int32_t*>(tokens.const_data_ptr());
  for (int64_t r = 0; x.is_cpu() && r < tokens.numel(); ++r)
    LLMCORE_CHECK(values[r] >= 0 && values[r] < x.size(0), name, "[", r, "] is ", values[r],
                  "; accepted: 0 to tokens - 1 = ", x.size(0) - 1);
  return tokens;
}

Tensor quantized_grouped_linear(const Tensor& x, const Tensor& packed, const std::string& format, int64_t out_features,
                                const Tensor& offsets, const OptTensor& token_of, const OptTensor& bias) {
  const std::string op = "quantized_grouped_linear";
  const DType dtype = float_dtype(x, (op + ": x").c_str());
  check_dim(x, 2, (op + ": x").c_str(), token_of ? "(tokens, k)" : "(rows, k)");
  check_dim(offsets, 1, (op + ": offsets").c_str(), "(num_experts + 1,)");
  const int64_t num_experts = offsets.size(0) - 1, n = out_features, k = x.size(1);
  LLMCORE_CHECK(num_experts >= 1, op, ": offsets has shape ", shape_text(offsets), "; there must be an expert");
  const QuantFormat f = quant_format(format, op.c_str());
  const Tensor weight = checked_weight(packed, x, f, n, k, op, num_experts);
  if (bias) check_like(*bias, x, {num_experts, n}, (op + ": bias").c_str(), "x");
  const OptTensor b = bias ? OptTensor(dense(*bias)) : std::nullopt;
  const OptTensor tokens = token_of ? OptTensor(checked_tokens(*token_of, x)) : std::nullopt;
  const int64_t rows = tokens ? tokens->numel() : x.size(0);
  const Tensor bounds = checked_offsets(offsets, x, rows, (op + ": offsets").c_str(), tokens ? "token_of" : "x");
  const Rows x_rows = as_rows(x);
  Tensor y = empty(x, {rows, n});
  const QuantizedGroupedLinearParams p{{dtype, f, rows, n, k, x_rows.tensor.const_data_ptr(), x_rows.stride,
                                        static_cast<const uint8_t*>(weight.const_data_ptr()),
                                        b ? b->const_data_ptr() : nullptr, y.mutable_data_ptr(), n},
                                       num_experts,
                                       static_cast<const int32_t*>(bounds.const_data_ptr()),
                                       tokens ? static_cast<const int32_t*>(tokens->const_data_ptr()) : nullptr};
  LLMCORE_RUN(quantized_grouped_linear, x, p);
  return y;
}

Tensor pack_quantized(const Tensor& blocks, const std::string& format) {
  const QuantFormat f = quant_format(format, "pack_quantized");
  const QuantLayout& layout = layout_of(f);
  LLMCORE_CHECK(
      blocks.scalar_type() == ScalarType::Byte && blocks.dim() == 2 && blocks.size(1) % layout.block_bytes == 0,
      "pack_quantized: blocks have shape ", shape_text(blocks), " and dtype ", dtype_name(blocks.scalar_type()),
      "; expected (n, bytes) uint8, ", layout.block_bytes, " bytes for ", layout.block, " weights of ", layout.name);
  const int64_t n = blocks.size(0), k = blocks.size(1) / layout.block_bytes * layout.block;
  const Tensor from = dense(blocks);
  Tensor packed = empty(blocks, {(n + kQuantPanel - 1) / kQuantPanel * quant_panel_bytes(layout, k)});
  const PackQuantizedParams p{f, n, k, static_cast<const uint8_t*>(from.const_data_ptr()),
                              static_cast<uint8_t*>(packed.mutable_data_ptr())};
  cpu::pack_quantized(p, torch_parallel());
  return packed;
}

Tensor quantized_embedding(const Tensor& ids, const Tensor& packed, const std::string& format, int64_t num_embeddings,
                           int64_t dim, ScalarType dtype) {
  const QuantFormat f = quant_format(format, "quantized_embedding");
  const Tensor rows = indices(ids, "quantized_embedding: ids");
  const Tensor weight = checked_weight(packed, ids, f, num_embeddings, dim, "quantized_embedding");
  const IndexValues values = values_of(rows);
  for (int64_t i = 0; ids.is_cpu() && i < values.size; ++i)
    LLMCORE_CHECK(values[i] >= 0 && values[i] < num_embeddings, "quantized_embedding: id ", values[i],
                  "; accepted: 0 to num_embeddings - 1 = ", num_embeddings - 1);
  std::vector<int64_t> shape(ids.dim() + 1, dim);
  for (int64_t d = 0; d < ids.dim(); ++d) shape[d] = ids.size(d);
  Tensor y = empty(ids, shape, dtype);
  const QuantizedEmbeddingParams p{float_dtype(y, "quantized_embedding: the result"),
                                   f,
                                   values.size,
                                   dim,
                                   num_embeddings,
                                   values.data,
                                   static_cast<const uint8_t*>(weight.const_data_ptr()),
                                   y.mutable_data_ptr()};
  LLMCORE_RUN(quantized_embedding, y, p);
  return y;
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("quantized_linear_", TORCH_BOX(&quantized_linear_));
  m.impl("quantized_grouped_linear", TORCH_BOX(&quantized_grouped_linear));
  m.impl("quantized_embedding", TORCH_BOX(&quantized_embedding));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

// On CUDA torch's ops do it, once (llmcore/ops/quantized_linear.py).
STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { m.impl("pack_quantized", TORCH_BOX(&pack_quantized)); }

}  // namespace llmcore
