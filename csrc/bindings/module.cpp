// What is not an op: build information, the choice of instruction set, the decoder, GGUF's strings.
#include <pybind11/pybind11.h>

#include "classes.h"
#include "gguf.h"
#include "llmcore/build_config.h"
#include "llmcore/huge_pages.h"
#include "llmcore/isa.h"
#include "loaded_symbol.h"
#ifdef LLMCORE_EMULATE_CUDA
#include "simt.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "llmcore's compiled kernels; the ops are registered with torch as torch.ops.llmcore.*";
  m.def("build_info", [] {
    py::dict info;
    info["isas"] = LLMCORE_BUILD_ISAS;
    info["cuda"] = LLMCORE_BUILD_CUDA;
    info["torch"] = LLMCORE_BUILD_TORCH;
    info["compiler"] = LLMCORE_BUILD_COMPILER;
    return info;
  });
  m.def(
      "cpu_isas",
      [] {
        py::list isas;
        for (int i = 0; i < static_cast<int>(llmcore::Isa::count); ++i)
          if (llmcore::isa_runs_here(static_cast<llmcore::Isa>(i)))
            isas.append(llmcore::isa_name(static_cast<llmcore::Isa>(i)));
        return isas;
      },
      "The instruction sets of this build that this machine can run, from plain to best.");
  m.def("cpu_traits", [] {
    const llmcore::CpuTraits traits = llmcore::cpu_traits();
    py::dict named;
    named["intel"] = traits.intel;
    named["amx_bf16"] = traits.amx_bf16;
    named["avx512_fp16"] = traits.avx512_fp16;
    return named;
  });
  m.def(
      "prefer_huge_pages",
      [](uintptr_t address, int64_t bytes) { llmcore::prefer_huge_pages(reinterpret_cast<void*>(address), bytes); },
      "Asks for huge pages under memory that is about to be written for the first time.");
  m.def("active_cpu_isa", [] { return llmcore::isa_name(llmcore::active_isa()); });
  m.def(
      "set_cpu_isa", [](const std::string& name) { return llmcore::set_isa(name.c_str()); },
      "Chooses the instruction set of the CPU kernels for the whole process; False when it is not available.");
  m.def(
      "has_loaded_symbol",
      [](const std::string& library, const std::string& symbol) {
        return llmcore::loaded_symbol(library.c_str(), symbol.c_str()) != nullptr;
      },
      "Whether the bindings find a function of a library that the process has loaded.");
  llmcore::add_block_allocator(m);
  llmcore::add_decoder(m);
  llmcore::add_gguf(m);
#ifdef LLMCORE_EMULATE_CUDA
  m.def(
      "emulator_options",
      [](const std::string& schedule, const std::string& copies, uint64_t seed, size_t shared_bytes) {
        simt::options() = {simt::schedule_named(schedule), simt::copies_named(copies), seed, shared_bytes};
      },
      py::arg("schedule"), py::arg("copies"), py::arg("seed"), py::arg("shared_bytes") = simt::Options().shared_bytes,
      "How the emulator runs the CUDA kernels that this thread launches from now on.");
  m.def(
      "emulator_counters",
      [] {
        const simt::Counters& c = simt::counters();
        py::dict counts;
        counts["mma"] = c.mma;
        counts["copies"] = c.copies;
        counts["ldmatrix_matrices"] = c.ldmatrix_matrices;
        counts["ldmatrix_wavefronts"] = c.ldmatrix_wavefronts;
        return counts;
      },
      "What the CUDA kernels that this thread launched have done so far.");
#endif
}
