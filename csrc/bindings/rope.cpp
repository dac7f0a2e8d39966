#include "llmcore/rope.h"

#include "common.h"

namespace llmcore {
namespace {

// Rotates x into y (the same tensor for the in-place op).
void launch(const Tensor& x, const Tensor& y, const Tensor& cos, const Tensor& sin, const OptTensor& positions,
            bool interleaved, bool inverse) {
  const bool packed = x.dim() == 3;
  const int64_t d = packed ? 0 : 1;  // the sequence dimension
  const Tensor c = dense(cos), s = dense(sin);
  RopeParams p{float_dtype(x, "rope: x"),
               packed ? 1 : x.size(0),
               x.size(d),
               x.size(d + 1),
               x.size(d + 2),
               2 * cos.size(1),
               interleaved,
               inverse,
               x.const_data_ptr(),
               {packed ? 0 : x.stride(0), x.stride(d), x.stride(d + 1)},
               y.mutable_data_ptr(),
               {packed ? 0 : y.stride(0), y.stride(d), y.stride(d + 1)},
               static_cast<const float*>(c.const_data_ptr()),
               static_cast<const float*>(s.const_data_ptr()),
               positions ? static_cast<const int64_t*>(positions->const_data_ptr()) : nullptr};
  LLMCORE_RUN(rope, x, p);
}

// All that could be wrong; returns the positions as dense int64. Positions on a CUDA device are not looked at.
OptTensor check(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptTensor& positions) {
  float_dtype(x, "rope: x");
  LLMCORE_CHECK(x.dim() == 4 || x.dim() == 3, "rope: x has shape ", shape_text(x),
                "; expected (batch, seq, heads, head_dim) or (total, heads, head_dim)");
  for (const Tensor* t : {&cos, &sin}) {
    const char* what = t == &cos ? "rope: cos" : "rope: sin";
    check_device(*t, x, what);
    check_dtype(*t, ScalarType::Float, what);
    check_dim(*t, 2, what, "(max_positions, rotary_dim / 2)");
  }
  LLMCORE_CHECK(shape_text(cos) == shape_text(sin), "rope: cos has shape ", shape_text(cos), ", but sin has ",
                shape_text(sin), "; they must be equal");
  const int64_t length = cos.size(0), head_dim = x.size(-1);
  LLMCORE_CHECK(2 * cos.size(1) <= head_dim, "rope: the tables rotate ", 2 * cos.size(1),
                " elements (rotary_dim, from cos of shape ", shape_text(cos), "), but x's head_dim is ", head_dim,
                "; rotary_dim must not exceed it");
  if (!positions) {
    const int64_t seq = x.size(x.dim() - 3);
    LLMCORE_CHECK(seq <= length || x.numel() == 0, "rope: position ", seq - 1, " (the last of ", seq,
                  " tokens) is outside the cos/sin table of length ", length);
    return std::nullopt;
  }
  if (x.dim() == 4)
    check_shape(*positions, {x.size(0), x.size(1)}, "rope: positions");
  else
    check_shape(*positions, {x.size(0)}, "rope: positions");
  check_device(*positions, x, "rope: positions");
  const Tensor dense_positions = indices(*positions, "rope: positions");
  if (!x.is_cpu()) return dense_positions;
  const IndexValues values = values_of(dense_positions);
  for (int64_t i = 0; i < values.size; ++i)
    LLMCORE_CHECK(values[i] >= 0 && values[i] < length, "rope: position ", values[i], " (token ", i,
                  ") is outside the cos/sin table of length ", length);
  return dense_positions;
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptTensor& positions, bool interleaved,
            bool inverse) {
  const OptTensor checked = check(x, cos, sin, positions);
  Tensor y = empty_same_shape(x);
  launch(last_dim_contiguous(x), y, cos, sin, checked, interleaved, inverse);
  return y;
}

void rope_(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptTensor& positions, bool interleaved,
           bool inverse) {
  const OptTensor checked = check(x, cos, sin, positions);
  check_writable(x, "rope_: x");
  launch(x, x, cos, sin, checked, interleaved, inverse);
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_", TORCH_BOX(&rope_));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
