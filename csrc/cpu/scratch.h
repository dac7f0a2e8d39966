// Aligned working memory of one kernel call.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "llmcore/huge_pages.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

// Larger blocks come straight from the kernel, which zeroes each page when it is first touched: a page fault for every
// 4 KiB costs more than the zeros.
constexpr size_t kHugeFrom = 4 * kHugePage;

// `count` elements on a 64-byte boundary, uninitialised, freed with the object. T is trivial.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t wanted = static_cast<size_t>(count > 0 ? count : 1) * sizeof(T);
    const size_t align = wanted >= kHugeFrom ? kHugePage : 64, bytes = (wanted + align - 1) / align * align;
    data_ = static_cast<T*>(aligned_alloc(align, bytes));
    if (!data_) abort();  // as operator new would, in code compiled without exceptions
    if (align == kHugePage) prefer_huge_pages(data_, static_cast<int64_t>(bytes));
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
