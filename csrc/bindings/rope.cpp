#include "llmcore/rope.h"

#include "common.h"
#include "rope_and_cache.h"

namespace llmcore {

RopeTables checked_tables(const std::string& op, const char* x_name, const Tensor& x,
                          std::initializer_list<int64_t> tokens, int64_t head_dim, const Tensor& cos, const Tensor& sin,
                          const OptTensor& positions) {
  for (const Tensor* t : {&cos, &sin}) {
    const std::string what = op + (t == &cos ? ": cos" : ": sin");
    check_device(*t, x, what.c_str());
    check_dtype(*t, ScalarType::Float, what.c_str());
    check_dim(*t, 2, what.c_str(), "(max_positions, rotary_dim / 2)");
  }
  LLMCORE_CHECK(shape_text(cos) == shape_text(sin), op, ": cos has shape ", shape_text(cos), ", but sin has ",
                shape_text(sin), "; they must be equal");
  const int64_t length = cos.size(0);
  LLMCORE_CHECK(2 * cos.size(1) <= head_dim, op, ": the tables rotate ", 2 * cos.size(1),
                " elements (rotary_dim, from cos of shape ", shape_text(cos), "), but ", x_name, "'s head_dim is ",
                head_dim, "; rotary_dim must not exceed it");
  if (!positions) {
    const int64_t seq = *(tokens.end() - 1);
    LLMCORE_CHECK(seq <= length || x.numel() == 0, op, ": position ", seq - 1, " (the last of ", seq,
                  " tokens) is outside the cos/sin table of length ", length);
    return {dense(cos), dense(sin), std::nullopt};
  }
  const std::string what = op + ": positions";
  check_shape(*positions, tokens, what.c_str());
  check_device(*positions, x, what.c_str());
  const Tensor dense_positions = indices(*positions, what.c_str());
  if (x.is_cpu()) {
    const IndexValues values = values_of(dense_positions);
    for (int64_t i = 0; i < values.size; ++i)
      LLMCORE_CHECK(values[i] >= 0 && values[i] < length, op, ": position ", values[i], " (token ", i,
                    ") is outside the cos/sin table of length ", length);
  }
  return {dense(cos), dense(sin), dense_positions};
}

namespace {

// All that could be wrong.
RopeTables check(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptTensor& positions) {
  float_dtype(x, "rope: x");
  LLMCORE_CHECK(x.dim() == 4 || x.dim() == 3, "rope: x has shape ", shape_text(x),
                "; expected (batch, seq, heads, head_dim) or (total, heads, head_dim)");
  if (x.dim() == 4) return checked_tables("rope", "x", x, {x.size(0), x.size(1)}, x.size(-1), cos, sin, positions);
  return checked_tables("rope", "x", x, {x.size(0)}, x.size(-1), cos, sin, positions);
}

// Rotates x into y (the same tensor for the in-place op).
void launch(const Tensor& x, const Tensor& y, const RopeTables& tables, bool interleaved, bool inverse) {
  const bool packed = x.dim() == 3;
  const int64_t d = packed ? 0 : 1;  // the sequence dimension
  RopeParams p{float_dtype(x, "rope: x"),
               packed ? 1 : x.size(0),
               x.size(d),
               x.size(d + 1),
               x.size(d + 2),
               tables.rotary_dim(),
               interleaved,
               inverse,
               x.const_data_ptr(),
               {packed ? 0 : x.stride(0), x.stride(d), x.stride(d + 1)},
               y.mutable_data_ptr(),
               {packed ? 0 : y.stride(0), y.stride(d), y.stride(d + 1)},
               tables.cos_data(),
               tables.sin_data(),
               tables.positions_data()};
  LLMCORE_RUN(rope, x, p);
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptTensor& positions, bool interleaved,
            bool inverse) {
  const RopeTables tables = check(x, cos, sin, positions);
  Tensor y = empty_same_shape(x);
  launch(last_dim_contiguous(x), y, tables, interleaved, inverse);
  return y;
}

void rope_(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptTensor& positions, bool interleaved,
           bool inverse) {
  const RopeTables tables = check(x, cos, sin, positions);
  check_writable(x, "rope_: x");
  launch(x, x, tables, interleaved, inverse);
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_", TORCH_BOX(&rope_));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
