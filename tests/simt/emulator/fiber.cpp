#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#if !defined(__x86_64__)
#error "the fiber switch is written for x86-64; add the few instructions of your machine's calling convention here"
#endif

// switch(void** save, void* to): not ucontext, whose swap makes a system call for the signal mask each time.
asm(R"(
.text
.type simt_fiber_switch,@function
simt_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_fiber_switch, .-simt_fiber_switch
)");
extern "C" void simt_fiber_switch(void** save, void* to);

namespace simt {

void Fiber::start(unsigned char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // entry's return address, and its stack alignment
  *--top = reinterpret_cast<void*>(entry);
  for (int registers = 0; registers < 6; ++registers) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::switch_from_to(Fiber& from, Fiber& to) { simt_fiber_switch(&from.stack_pointer_, to.stack_pointer_); }

unsigned char* pooled_stack(size_t i) {
  constexpr size_t kPage = 4096;
  static thread_local std::vector<unsigned char*> pool;
  while (pool.size() <= i) {
    void* at =
        mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    mprotect(at, kPage, PROT_NONE);
    pool.push_back(static_cast<unsigned char*>(at) + kPage);
  }

  return pool[i];
}

}  // namespace simt
