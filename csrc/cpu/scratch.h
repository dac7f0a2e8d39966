// Aligned working memory of one kernel call.
#pragma once
#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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
