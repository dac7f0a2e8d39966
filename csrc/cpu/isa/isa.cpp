// Chooses the instruction set at load time. Compiled without instruction-set flags: it must run anywhere.
#include "llmcore/isa.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace llmcore {
namespace {

#define X(isa) #isa,
const char* const names[] = {LLMCORE_FOR_EACH_ISA(X)};
#undef X

// What is emulated runs anywhere, and is never the default: see best().
bool supports(const char* isa) {
  if (!std::strcmp(isa, "portable") || !std::strcmp(isa, "cuda_emulated")) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();  // reads cpuid and xgetbv: a set whose registers the system doesn't save is not reported
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(isa, "avx2") || !std::strcmp(isa, "avx512bf16_emulated")) return v3;
  if (!std::strcmp(isa, "avx512")) return v4;
  if (!std::strcmp(isa, "avx512vnni")) return v4 && __builtin_cpu_supports("avx512vnni");
  if (!std::strcmp(isa, "avx512bf16"))
    return v4 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
  return false;
}

Isa best() {
  const char* wanted = std::getenv("LLMCORE_CPU_ISA");
  Isa found = Isa::portable;
  for (int i = 0; i < static_cast<int>(Isa::count); ++i) {
    if (!supports(names[i])) continue;
    if (wanted && !std::strcmp(wanted, names[i])) return static_cast<Isa>(i);
    if (!std::strstr(names[i], "emulated")) found = static_cast<Isa>(i);
  }
  return found;
}

Isa active = best();

}  // namespace

const char* isa_name(Isa isa) { return names[static_cast<int>(isa)]; }
bool isa_runs_here(Isa isa) { return supports(isa_name(isa)); }
Isa active_isa() { return active; }

CpuTraits cpu_traits() {
  CpuTraits traits{};
#if defined(__x86_64__)
  __builtin_cpu_init();
  traits.intel = __builtin_cpu_is("intel");
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) traits.amx_bf16 = d >> 22 & 1, traits.avx512_fp16 = d >> 23 & 1;
#endif
  return traits;
}

bool set_isa(const char* name) {
  for (int i = 0; i < static_cast<int>(Isa::count); ++i)
    if (!std::strcmp(name, names[i]) && supports(name)) {
      active = static_cast<Isa>(i);
      return true;
    }
  return false;
}

}  // namespace llmcore
