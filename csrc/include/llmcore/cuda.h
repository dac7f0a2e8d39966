// What the CUDA launchers need to know of the device, and how they report. Free of CUDA headers, for the bindings.
#pragma once
#include <cstddef>

namespace llmcore {
namespace cuda {

struct Device {
  void* stream;         // cudaStream_t
  int multiprocessors;  // of the device, to size grids
  int shared_bytes;     // of shared memory that a CTA may have: 99 KiB on some, 163 on sm_80, 227 on sm_90
  int index = 0;        // the device's number
};

// Null, or what went wrong, as the CUDA runtime words it. Launchers queue work on the device's stream and return: they
// never wait for it, so that they can be captured in a CUDA graph.
using Status = const char*;

// Makes device `index` current for this library's copy of the CUDA runtime, and fills in what does not depend on a
// call.
Status describe(int index, Device& device);

}  // namespace cuda
}  // namespace llmcore

// Declares the launcher of an op's CUDA kernel, the twin of LLMCORE_CPU_KERNEL.
#define LLMCORE_CUDA_KERNEL(kernel, Params)             \
  namespace cuda {                                      \
  Status kernel(const Params& p, const Device& device); \
  }
