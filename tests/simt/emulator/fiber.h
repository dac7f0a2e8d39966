// A CUDA thread's flow of control: a stack of its own and a switch that saves the callee-saved registers.
#pragma once
#include <cstddef>

namespace simt {

class Fiber {
 public:
  // The fiber starts in `entry` when it is first switched to. `entry` must not return.
  void start(unsigned char* stack, size_t bytes, void (*entry)());
  // Leaves `from` and goes on in `to`; returns when somebody switches back to `from`.
  static void switch_from_to(Fiber& from, Fiber& to);

 private:
  void* stack_pointer_ = nullptr;
};

constexpr size_t kStackBytes = 256 << 10;
// Stack `i` of this OS thread, kept for the next CTA; below it lies a page that faults.
unsigned char* pooled_stack(size_t i);

}  // namespace simt
