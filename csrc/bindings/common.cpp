#include "common.h"

#include <algorithm>
#include <array>

#include "loaded_symbol.h"

namespace llmcore {

std::string dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    default: return "scalar type " + std::to_string(static_cast<int>(t));
  }
}

std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

DType float_dtype(const Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: fail(what, " has dtype ", dtype_name(t.scalar_type()), "; accepted: float32, bfloat16, float16");
  }
}

DType cache_dtype(const Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Char: return DType::i8;
    case ScalarType::Float8_e4m3fn: return DType::f8;
    default:
      fail(what, " has dtype ", dtype_name(t.scalar_type()),
           "; accepted: float32, bfloat16, float16, int8, float8_e4m3fn");
  }
}

void check_cpu(const Tensor& t, const char* what) {
  LLMCORE_CHECK(t.is_cpu(), what, " is not on the CPU, but the other tensors are; all must be on one device");
}

void check_device(const Tensor& t, const Tensor& like, const char* what) {
  const auto place = [](const Tensor& x) -> std::string {
    if (x.is_cpu()) return "the CPU";
    return x.is_cuda() ? "CUDA device " + std::to_string(x.get_device()) : "another device";
  };
  LLMCORE_CHECK(place(t) == place(like), what, " is on ", place(t), ", but the other tensors are on ", place(like),
                "; all must be on one device");
}

void check_same_dtype(const Tensor& t, const Tensor& like, const char* what, const char* like_what) {
  LLMCORE_CHECK(t.scalar_type() == like.scalar_type(), what, " has dtype ", dtype_name(t.scalar_type()), ", but ",
                like_what, " has ", dtype_name(like.scalar_type()), "; they must be equal");
}

void check_dim(const Tensor& t, int64_t dim, const char* what, const char* shape) {
  LLMCORE_CHECK(t.dim() == dim, what, " has shape ", shape_text(t), "; expected ", shape);
}

void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* what) {
  bool ok = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (int64_t s : shape) ok = ok && t.size(i++) == s;
  if (ok) return;
  std::ostringstream expected;
  for (int64_t s : shape) expected << (expected.tellp() > 0 ? ", " : "") << s;
  fail(what, " has shape ", shape_text(t), "; expected (", expected.str(), ")");
}

void check_dtype(const Tensor& t, ScalarType dtype, const char* what) {
  LLMCORE_CHECK(t.scalar_type() == dtype, what, " has dtype ", dtype_name(t.scalar_type()), "; expected ",
                dtype_name(dtype));
}

void check_like(const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape, const char* what,
                const char* like_what) {
  check_device(t, like, what);
  check_same_dtype(t, like, what, like_what);
  check_shape(t, shape, what);
}

void check_same_shape(const Tensor& t, const Tensor& like, const char* what, const char* like_what) {
  check_device(t, like, what);
  check_same_dtype(t, like, what, like_what);
  LLMCORE_CHECK(shape_text(t) == shape_text(like), what, " has shape ", shape_text(t), ", but ", like_what, " has ",
                shape_text(like), "; they must be equal");
}

void check_writable(const Tensor& t, const char* what) {
  if (t.numel() == 0) return;
  const int64_t last = t.dim() - 1;
  LLMCORE_CHECK(last < 0 || t.size(last) == 1 || t.stride(last) == 1, what, " has stride ",
                last < 0 ? 0 : t.stride(last), " in its last dimension; it is written in place and must have stride 1");
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size); any view of a dense tensor nests when sorted
  for (int64_t d = 0; d <= last; ++d)
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;
  for (auto [stride, size] : dims) {
    LLMCORE_CHECK(stride >= extent, what, " has overlapping elements (a dimension of size ", size, " has stride ",
                  stride, "); it is written in place, so pass a tensor whose elements are distinct");
    extent += stride * (size - 1);
  }
}

Tensor indices(const Tensor& t, const char* what) {
  LLMCORE_CHECK(t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int, what, " has dtype ",
                dtype_name(t.scalar_type()), "; accepted: int32, int64");
  return dense(torch::stable::to(t, ScalarType::Long));
}

Tensor checked_offsets(const Tensor& t, const Tensor& like, int64_t total, const char* what, const char* of) {
  check_device(t, like, what);
  check_dtype(t, ScalarType::Int, what);
  LLMCORE_CHECK(t.dim() == 1 && t.size(0) >= 1, what, " has shape ", shape_text(t),
                "; expected offsets (n + 1,) that start with 0");
  const Tensor result = dense(t);
  if (!t.is_cpu()) return result;
  const int32_t* values = static_cast<const int32_t*>(result.const_data_ptr());
  const int64_t n = t.size(0);
  LLMCORE_CHECK(values[0] == 0, what, "[0] is ", values[0], "; offsets start with 0");
  for (int64_t i = 1; i < n; ++i)
    LLMCORE_CHECK(values[i] >= values[i - 1], what, "[", i, "] is ", values[i], ", below ", values[i - 1],
                  " before it; offsets must not fall");
  LLMCORE_CHECK(values[n - 1] == total, what, " ends with ", values[n - 1], ", but ", of, " has ", total,
                " rows; they must be equal");
  return result;
}

void check_softcap(double softcap, const std::string& op) {
  LLMCORE_CHECK(softcap == 0 || (softcap >= 1e-30 && softcap <= 1e30), op, ": softcap is ", softcap,
                "; accepted: 1e-30 to 1e30, or 0 for none");
}

Tensor last_dim_contiguous(const Tensor& t) {
  return t.dim() == 0 || t.size(-1) == 1 || t.stride(-1) == 1 ? t : torch::stable::contiguous(t);
}

std::optional<int64_t> row_stride(const Tensor& t) {
  const int64_t dims = t.dim();
  if (dims == 0 || (t.size(dims - 1) > 1 && t.stride(dims - 1) != 1)) return std::nullopt;
  std::optional<int64_t> stride;  // of the innermost leading dimension longer than 1
  int64_t expected = 0;
  for (int64_t d = dims - 2; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (!stride) {
      stride = t.stride(d);
      expected = *stride * t.size(d);
    } else if (t.stride(d) == expected) {
      expected *= t.size(d);
    } else {
      return std::nullopt;
    }
  }
  return stride.value_or(t.size(dims - 1));
}

Rows as_rows(const Tensor& t) {
  LLMCORE_CHECK(t.dim() >= 1, "expected a tensor of at least one dimension, got a scalar");
  const int64_t dim = t.size(-1), rows = dim == 0 ? 0 : t.numel() / dim;
  if (auto stride = row_stride(t)) return {t, rows, dim, *stride};
  return {torch::stable::contiguous(t), rows, dim, dim};
}

// torch::stable::new_empty goes through the dispatcher with boxed arguments, which takes longer than a small kernel.
static Tensor new_empty(const Tensor& like, const int64_t* shape, int64_t dims, std::optional<ScalarType> dtype) {
  int32_t device_type, device_index, type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  if (dtype) {
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  }
  std::vector<int64_t> strides(dims);
  int64_t stride = 1;
  for (int64_t d = dims; d-- > 0; stride *= shape[d] > 0 ? shape[d] : 1) strides[d] = stride;
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, shape, strides.data(), type, device_type, device_index, &result));
  return Tensor(result);
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype) {
  return new_empty(like, shape.begin(), static_cast<int64_t>(shape.size()), dtype);
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, std::optional<ScalarType> dtype) {
  return new_empty(like, shape.data(), static_cast<int64_t>(shape.size()), dtype);
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype) {
  return torch::stable::new_zeros(like, {shape.begin(), shape.size()}, dtype);
}

Tensor empty_same_shape(const Tensor& like, std::optional<ScalarType> dtype) {
  std::vector<int64_t> shape(like.dim());
  for (int64_t i = 0; i < like.dim(); ++i) shape[i] = like.size(i);
  return empty(like, shape, dtype);
}

Tensor sum_partials(const Tensor& partials, ScalarType dtype) {
  const std::array<int64_t, 1> first{0};
  const Tensor sum = torch::stable::sum(partials, torch::headeronly::IntHeaderOnlyArrayRef(first.data(), 1));
  return sum.scalar_type() == dtype ? sum : torch::stable::to(sum, dtype);  // rounded once
}

Parallel torch_parallel() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t workers, void* ctx, void (*body)(void*, int64_t)) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t w = begin; w < end; ++w) body(ctx, w);
            });
          }};
}

#ifdef LLMCORE_CUDA
namespace {

// torch's current stream of a CUDA device. Looked up at run time: a torch without CUDA has no such function, and the
// device-generic one gives its native handle from 2.13 on only.
void* current_stream(int device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function =
      reinterpret_cast<Function>(loaded_symbol("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"));
  LLMCORE_CHECK(function, "this torch has no CUDA streams; llmcore's CUDA kernels need a torch built for CUDA");
  void* stream = nullptr;
  LLMCORE_CHECK(function(device, &stream) == 0, "torch gave no current stream for CUDA device ", device);
  return stream;
}

}  // namespace

CudaCall::CudaCall(const Tensor& like) : like_(like), guard_(like.get_device()), device_{} {
  device_.stream = current_stream(like.get_device());
  check(cuda::describe(like.get_device(), device_), "device");
}

OptTensor CudaCall::workspace(int64_t bytes) const {
  if (bytes == 0) return std::nullopt;
  return empty(like_, {bytes}, ScalarType::Byte);
}

void CudaCall::check(cuda::Status status, const char* kernel) const {
  LLMCORE_CHECK(!status, kernel, " of a tensor of shape ", shape_text(like_), " on CUDA device ", like_.get_device(),
                ": ", status);
}
#endif

}  // namespace llmcore
