// ThreadSanitizer, when the program is built with it: every CUDA thread is a TSan fiber, and only what synchronises on
// a GPU synchronises here. In other builds the functions do nothing.
//
// The emulator itself is built without instrumentation; what it reads and writes on behalf of a kernel it announces.
#pragma once
#include <cstddef>

extern "C" {
void* __tsan_create_fiber(unsigned) __attribute__((weak));
void __tsan_destroy_fiber(void*) __attribute__((weak));
void __tsan_switch_to_fiber(void*, unsigned) __attribute__((weak));
void* __tsan_get_current_fiber() __attribute__((weak));
void __tsan_acquire(void*) __attribute__((weak));
void __tsan_release(void*) __attribute__((weak));
void __tsan_read_range(void*, unsigned long) __attribute__((weak));
void __tsan_write_range(void*, unsigned long) __attribute__((weak));
unsigned __tsan_atomic32_exchange(volatile unsigned*, unsigned, int) __attribute__((weak));
void AnnotateIgnoreReadsBegin(const char*, int) __attribute__((weak));
void AnnotateIgnoreReadsEnd(const char*, int) __attribute__((weak));
void AnnotateIgnoreWritesBegin(const char*, int) __attribute__((weak));
void AnnotateIgnoreWritesEnd(const char*, int) __attribute__((weak));
}

namespace simt::race {

inline bool on() { return __tsan_create_fiber != nullptr; }
inline void* create_fiber() { return on() ? __tsan_create_fiber(0) : nullptr; }
inline void destroy_fiber(void* fiber) {
  if (fiber) __tsan_destroy_fiber(fiber);
}
inline void* current_fiber() { return on() ? __tsan_get_current_fiber() : nullptr; }
inline void switch_to(void* fiber) {
  if (on()) __tsan_switch_to_fiber(fiber, 1);  // 1: the switch itself orders nothing
}
// Likewise, and what the fiber that is left has done happens before what `fiber` does from now on.
inline void switch_and_order(void* fiber) {
  if (on()) __tsan_switch_to_fiber(fiber, 0);
}

// What comes before release(x) in one thread happens before what comes after acquire(x) in another.
inline void acquire(void* x) {
  if (on()) __tsan_acquire(x);
}
inline void release(void* x) {
  if (on()) __tsan_release(x);
}
inline void read(const void* at, size_t bytes) {
  if (on()) __tsan_read_range(const_cast<void*>(at), bytes);
}
inline void wrote(void* at, size_t bytes) {
  if (on()) __tsan_write_range(at, bytes);
}

// Stores a value that others change atomically too, which is a race with plain accesses only. Orders nothing.
inline void atomic_store(unsigned* at, unsigned value) {
  if (on())
    __tsan_atomic32_exchange(at, value, 0);  // 0: relaxed
  else
    *at = value;
}

// Hides the emulator's own bookkeeping (and the memcpy, malloc and free in it, which TSan intercepts even here).
// Never across a switch of fibers, since the state is the fiber's.
class Ignore {
 public:
  Ignore() {
    if (!on()) return;
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Ignore() {
    if (!on()) return;
    AnnotateIgnoreReadsEnd("", 0);
    AnnotateIgnoreWritesEnd("", 0);
  }
  Ignore(const Ignore&) = delete;
  Ignore& operator=(const Ignore&) = delete;
};

}  // namespace simt::race
