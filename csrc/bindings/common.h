// What every binding shares: argument checks, dtype names, and torch's thread pool as a llmcore::Parallel.
// Bindings see torch only through the LibTorch stable ABI
// (https://docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html).
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/parallel.h"

namespace llmcore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// LLMCORE_CHECK(cond, "rms_norm: ", ...): throws a RuntimeError that names the value and what is accepted.
#define LLMCORE_CHECK(cond, ...)               \
  do {                                         \
    if (!(cond)) ::llmcore::fail(__VA_ARGS__); \
  } while (0)

std::string dtype_name(ScalarType t);     // "float32"
std::string shape_text(const Tensor& t);  // "(2, 3)"

// The kernel's dtype of a floating-point tensor; an error that names `what` for any other dtype.
DType float_dtype(const Tensor& t, const char* what);
DType cache_dtype(const Tensor& t, const char* what);  // of a cache of keys or values
void check_cpu(const Tensor& t, const char* what);
void check_device(const Tensor& t, const Tensor& like, const char* what);  // on `like`'s device
void check_same_dtype(const Tensor& t, const Tensor& like, const char* what, const char* like_what);
void check_dim(const Tensor& t, int64_t dim, const char* what, const char* shape);
void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* what);
void check_dtype(const Tensor& t, ScalarType dtype, const char* what);

// On `like`'s device, of its dtype, and of the given shape / of `like`'s shape.
void check_like(const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape, const char* what,
                const char* like_what);
void check_same_shape(const Tensor& t, const Tensor& like, const char* what, const char* like_what);
// Of an argument that the op mutates: the last dimension is contiguous and no two elements share memory.
void check_writable(const Tensor& t, const char* what);

// An int32 or int64 tensor as dense int64; an error that names `what` for any other dtype.
Tensor indices(const Tensor& t, const char* what);
// The values of a CPU tensor of `indices`: only there can a binding look at them without waiting for a device.
struct IndexValues {
  const int64_t* data;
  int64_t size;
  int64_t operator[](int64_t i) const { return data[i]; }
};
inline IndexValues values_of(const Tensor& t) { return {static_cast<const int64_t*>(t.const_data_ptr()), t.numel()}; }

// int32 (n + 1,) offsets into `total` rows of `of`, on `like`'s device, dense. They rise from 0 to `total`, which is
// looked at on the CPU only.
Tensor checked_offsets(const Tensor& t, const Tensor& like, int64_t total, const char* what, const char* of);

// Where softcap and 1 / softcap, times a score or its scale, stay finite in float32.
void check_softcap(double softcap, const std::string& op);

// The tensor itself if its last dimension is contiguous, else a contiguous copy.
Tensor last_dim_contiguous(const Tensor& t);
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// One stride for all leading dimensions, when (d0, ..., dk, dim) can be walked as rows of `dim`: nullopt when not.
std::optional<int64_t> row_stride(const Tensor& t);
// t as rows of its last dimension: t itself when one stride walks them, else a contiguous copy.
struct Rows {
  Tensor tensor;
  int64_t rows, dim, stride;
};
Rows as_rows(const Tensor& t);

// A new tensor on `like`'s device.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype = std::nullopt);
Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, std::optional<ScalarType> dtype = std::nullopt);
Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype = std::nullopt);
Tensor empty_same_shape(const Tensor& like, std::optional<ScalarType> dtype = std::nullopt);  // contiguous

// How many partial sums (of kSumRows each) there are of `rows` rows.
inline int64_t num_partials(int64_t rows) { return (rows + kSumRows - 1) / kSumRows; }
// (partials, ...) float32 or float64 -> their sum over the first dimension, in `dtype`.
Tensor sum_partials(const Tensor& partials, ScalarType dtype);

Parallel torch_parallel();

// LLMCORE_RUN(rope, x, p): the op's kernel on the device where `x` is. LLMCORE_RUN_WITH_WORKSPACE: a launcher that
// needs p.workspace, of the size that its twin KERNEL_workspace tells; torch's allocator reuses it once the stream has
// passed this call.
#ifdef LLMCORE_CUDA
// `like`'s device made current, and its current stream.
class CudaCall {
 public:
  explicit CudaCall(const Tensor& like);
  const cuda::Device& device() const { return device_; }
  OptTensor workspace(int64_t bytes) const;                   // none for 0 bytes
  void check(cuda::Status status, const char* kernel) const;  // throws, with the kernel's name and like's shape

 private:
  const Tensor& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Device device_;
};
#define LLMCORE_RUN(kernel, like, p)                         \
  do {                                                       \
    if ((like).is_cpu()) {                                   \
      cpu::kernel(p, torch_parallel());                      \
    } else {                                                 \
      const CudaCall call_(like);                            \
      call_.check(cuda::kernel(p, call_.device()), #kernel); \
    }                                                        \
  } while (0)
#define LLMCORE_RUN_WITH_WORKSPACE(kernel, like, p)                                           \
  do {                                                                                        \
    if ((like).is_cpu()) {                                                                    \
      cpu::kernel(p, torch_parallel());                                                       \
    } else {                                                                                  \
      const CudaCall call_(like);                                                             \
      const OptTensor memory_ = call_.workspace(cuda::kernel##_workspace(p, call_.device())); \
      if (memory_) (p).workspace = memory_->mutable_data_ptr();                               \
      call_.check(cuda::kernel(p, call_.device()), #kernel);                                  \
    }                                                                                         \
  } while (0)
#define LLMCORE_REGISTER(register_kernels)                            \
  STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { register_kernels(m); } \
  STABLE_TORCH_LIBRARY_IMPL(llmcore, CUDA, m) { register_kernels(m); }
#else
#define LLMCORE_RUN(kernel, like, p) (static_cast<void>(like), cpu::kernel(p, torch_parallel()))
#define LLMCORE_RUN_WITH_WORKSPACE LLMCORE_RUN
#define LLMCORE_REGISTER(register_kernels) \
  STABLE_TORCH_LIBRARY_IMPL(llmcore, CPU, m) { register_kernels(m); }
#endif

}  // namespace llmcore
