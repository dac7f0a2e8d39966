// Instruction-set choice. A kernel is declared once with LLMCORE_CPU_KERNEL; its .cpp is compiled once per instruction
// set, and callers reach the best version this machine can run (or the one chosen by set_isa).
#pragma once
#include "llmcore/isa_list.h"  // generated: LLMCORE_FOR_EACH_ISA
#include "llmcore/parallel.h"

namespace llmcore {

enum class Isa : int {
#define X(isa) isa,
  LLMCORE_FOR_EACH_ISA(X)
#undef X
      count
};

const char* isa_name(Isa isa);
bool isa_runs_here(Isa isa);     // by cpuid, the operating system's register saving included
Isa active_isa();                // the best that runs here, unless set_isa or LLMCORE_CPU_ISA said otherwise
bool set_isa(const char* name);  // false when unknown or not runnable here

// What decides how fast the products of torch's libraries are (llmcore/ops/linear.py).
struct CpuTraits {
  bool intel, amx_bf16, avx512_fp16;
};
CpuTraits cpu_traits();

}  // namespace llmcore

// Declares a kernel's versions and, for callers, the function that picks one: LLMCORE_CPU_KERNEL for most kernels,
// LLMCORE_CPU_KERNEL_BF16 for those with code of their own for AVX-512 BF16 (bf16_sources in CMakeLists.txt),
// LLMCORE_CPU_KERNEL_INT8 for those with code of their own for VNNI too (int8_sources).
#ifdef LLMCORE_ISA
#define LLMCORE_CPU_KERNEL(kernel, Params)           \
  namespace cpu {                                    \
  namespace LLMCORE_ISA {                            \
  void kernel(const Params& p, const Parallel& par); \
  }                                                  \
  }
#define LLMCORE_CPU_KERNEL_BF16 LLMCORE_CPU_KERNEL
#define LLMCORE_CPU_KERNEL_INT8 LLMCORE_CPU_KERNEL
#else
#define LLMCORE_ISA_DECLARE_(isa, kernel, Params)    \
  namespace isa {                                    \
  void kernel(const Params& p, const Parallel& par); \
  }
#define LLMCORE_ISA_ENTRY_(isa, kernel) isa::kernel,
#define LLMCORE_CPU_KERNEL_(kernel, Params, ENTRIES)                     \
  namespace cpu {                                                        \
  LLMCORE_ISA_DECLARATIONS(LLMCORE_ISA_DECLARE_, kernel, Params)         \
  inline void kernel(const Params& p, const Parallel& par) {             \
    using Fn = void (*)(const Params&, const Parallel&);                 \
    static constexpr Fn table[] = {ENTRIES(LLMCORE_ISA_ENTRY_, kernel)}; \
    table[static_cast<int>(active_isa())](p, par);                       \
  }                                                                      \
  }
#define LLMCORE_CPU_KERNEL(kernel, Params) LLMCORE_CPU_KERNEL_(kernel, Params, LLMCORE_ISA_PLAIN_ENTRIES)
#define LLMCORE_CPU_KERNEL_BF16(kernel, Params) LLMCORE_CPU_KERNEL_(kernel, Params, LLMCORE_ISA_BF16_ENTRIES)
#define LLMCORE_CPU_KERNEL_INT8(kernel, Params) LLMCORE_CPU_KERNEL_(kernel, Params, LLMCORE_ISA_INT8_ENTRIES)
#endif
