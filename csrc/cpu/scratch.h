// Aligned working memory of one kernel call.
#pragma once
#include <cstdint>
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

// Large blocks come straight from the kernel, which zeroes each page when it is first touched: a page fault for every
// 4 KiB costs more than the zeros, so ask for huge pages.
constexpr size_t kHugePage = size_t{2} << 20, kHugeFrom = 4 * kHugePage;

// `count` elements on a 64-byte boundary, uninitialised, freed with the object. T is trivial.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t wanted = static_cast<size_t>(count > 0 ? count : 1) * sizeof(T);
    const size_t align = wanted >= kHugeFrom ? kHugePage : 64, bytes = (wanted + align - 1) / align * align;
    data_ = static_cast<T*>(aligned_alloc(align, bytes));
    if (!data_) abort();  // as operator new would, in code compiled without exceptions
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (align == kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: whether it is granted does not matter
#endif
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  T* data_;
};

// Asks for huge pages under a large output that is about to be written for the first time: each page fault then clears
// 2 MiB, not 4 KiB. Where the system has none, or the memory is in use already, nothing happens.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t at = reinterpret_cast<uintptr_t>(data), begin = (at + kPage - 1) / kPage * kPage,
                  end = (at + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
