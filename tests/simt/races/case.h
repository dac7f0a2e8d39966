// Race cases: small random calls of a CUDA kernel through its params struct, on the emulator under ThreadSanitizer,
// held against the portable CPU kernel. A kernel is added by a RACE_CASE in a file of this folder (docs/cuda.md).
#pragma once
#include <cstring>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/parallel.h"

namespace races {

using llmcore::DType;

constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};

// n elements of a dtype. Aligned to 16 bytes.
class Tensor {
 public:
  Tensor(DType dtype, int64_t n);
  static Tensor doubles(int64_t n);  // float64, which no op has but some sums
  void* data() const { return bytes_.get(); }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(bytes_.get());
  }
  int64_t size() const { return size_; }
  double get(int64_t i) const;
  void set(int64_t i, double value);  // rounded to the dtype
  void fill_bytes(int byte);
  void copy_from(const Tensor& other);
  DType dtype() const { return dtype_; }

 private:
  Tensor(DType dtype, int64_t n, int64_t bytes_of_element);
  DType dtype_;  // of doubles: float32, which is how exact they are expected to be
  int64_t size_, num_bytes_;
  struct Delete {
    void operator()(unsigned char* bytes) const;
  };
  std::unique_ptr<unsigned char[], Delete> bytes_;
};

Tensor random_normal(DType dtype, int64_t n);  // another one at every call, the same in every run
Tensor random_uniform(DType dtype, int64_t n, double low, double high);

// What a kernel writes. Before each run it holds NaN, or zeros where the kernel adds to it, or a copy of what the
// kernel replaces in place.
struct Output {
  const char* name;
  Tensor& tensor;
  bool zeroed = false;
  // Largest difference, as a part of the largest magnitude, that counts as agreement; 0: the dtype's usual one.
  double tolerance = 0;
  const Tensor* replaces = nullptr;
};

constexpr llmcore::cuda::Device kDevice{nullptr, 3, 227 * 1024};
extern const llmcore::Parallel kSerial;

void run_and_compare(const char* label, std::initializer_list<Output> outputs, void* context,
                     llmcore::cuda::Status (*on_emulator)(void*), void (*on_cpu)(void*));

// Runs kernel(p) on the emulator and on the CPU and compares the outputs, to which p points. Throws std::runtime_error.
template <class Params>
void check(const char* label, llmcore::cuda::Status (*on_emulator)(const Params&, const llmcore::cuda::Device&),
           void (*on_cpu)(const Params&, const llmcore::Parallel&), const std::type_identity_t<Params>& p,
           std::initializer_list<Output> outputs) {
  struct Call {
    decltype(on_emulator) emulated;
    decltype(on_cpu) portable;
    const Params* p;
  } call{on_emulator, on_cpu, &p};
  run_and_compare(
      label, outputs, &call,
      [](void* c) { return static_cast<Call*>(c)->emulated(*static_cast<Call*>(c)->p, kDevice); },
      [](void* c) { static_cast<Call*>(c)->portable(*static_cast<Call*>(c)->p, kSerial); });
}

bool add_case(const char* kernel, void (*run)());
struct Case {
  const char* kernel;
  void (*run)();
};
const std::vector<Case>& cases();

}  // namespace races

// check(label, BOTH(kernel), params, outputs)
#define BOTH(kernel) ::llmcore::cuda::kernel, ::llmcore::cpu::portable::kernel

// RACE_CASE(kernel) { calls of check }: the file is built when csrc/cuda defines the launcher `kernel`.
#define RACE_CASE(kernel)                                                     \
  static void kernel##_case();                                                \
  static const bool kernel##_added = races::add_case(#kernel, kernel##_case); \
  static void kernel##_case()
