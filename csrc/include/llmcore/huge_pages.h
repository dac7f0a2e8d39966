// A wish for pages of 2 MiB under memory that is large and read or written as a whole.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llmcore {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// For memory that is about to be written for the first time: each page fault then clears 2 MiB, not 4 KiB, and reading
// it later takes fewer translations of addresses. Where the system has none, or the memory is in use already, nothing
// happens. (static: no copy that is compiled for one instruction set may serve another)
static inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t at = reinterpret_cast<uintptr_t>(data), begin = (at + kHugePage - 1) / kHugePage * kHugePage,
                  end = (at + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

}  // namespace llmcore
