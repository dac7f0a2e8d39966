// Aligned working memory of one kernel call.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

// `count` elements on a 64-byte boundary, uninitialised, freed with the object. T is trivial.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(aligned_alloc(64, bytes));
    if (!data_) abort();  // as operator new would, in code compiled without exceptions
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
