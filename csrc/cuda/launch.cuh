// Starts kernels, on a GPU or on the emulator.
#pragma once
#include <type_traits>

#include "llmcore/cuda.h"
#include "ptx.cuh"

#ifndef __CUDACC__
#include <string>
#endif

namespace llmcore {
namespace cuda {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// kernel<<<grid, threads, shared_bytes, stream>>>(args...); an empty grid is no work. Null, or the error's text.
template <class... Params>
Status launch(void (*kernel)(Params...), Grid grid, int threads, int shared_bytes, const Device& device,
              const std::type_identity_t<Params>&... args);

// The same for a kernel every thread of which calls ptx::wait_for_grids() before it touches what earlier kernels of the
// stream read or write. Where the device can, the grid starts when all CTAs of the kernel in front of it have called
// ptx::launch_dependents() or ended, and waits on the multiprocessors instead of in the queue.
template <class... Params>
Status launch_dependent(void (*kernel)(Params...), Grid grid, int threads, int shared_bytes, const Device& device,
                        const std::type_identity_t<Params>&... args);

#ifdef __CUDACC__

inline Status text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

struct KernelFacts {
  Status error;
  bool can_wait;  // its code holds griddepcontrol.wait
};
// Lets the kernel have all the shared memory that the device gives a CTA. Asks the CUDA runtime once for each kernel,
// device and thread.
KernelFacts prepare(const void* kernel, const Device& device);

inline Status start(const void* kernel, Grid grid, int threads, int shared_bytes, const Device& device, bool dependent,
                    void** args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(device.stream);
  cudaLaunchAttribute early{};
  if (shared_bytes > 48 * 1024 || dependent) {  // more than 48 KiB must be asked for
    const KernelFacts facts = prepare(kernel, device);
    if (facts.error) return facts.error;
    if (dependent && facts.can_wait) {
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
      config.attrs = &early;
      config.numAttrs = 1;
    }
  }
  return text(cudaLaunchKernelExC(&config, kernel, args));
}

template <class... Params>
Status launch(void (*kernel)(Params...), Grid grid, int threads, int shared_bytes, const Device& device,
              const std::type_identity_t<Params>&... args) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  return start(reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes, device, false, pointers);
}

template <class... Params>
Status launch_dependent(void (*kernel)(Params...), Grid grid, int threads, int shared_bytes, const Device& device,
                        const std::type_identity_t<Params>&... args) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  return start(reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes, device, true, pointers);
}

#else

template <class Kernel>
Status start(Grid grid, int threads, int shared_bytes, bool dependent, const Kernel& kernel) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  static thread_local std::string message;
  try {
    simt::launch(
        simt::Dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)),
        static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes), kernel, dependent);
  } catch (const simt::Error& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

template <class... Params>
Status launch(void (*kernel)(Params...), Grid grid, int threads, int shared_bytes, const Device&,
              const std::type_identity_t<Params>&... args) {
  return start(grid, threads, shared_bytes, false, [&] { kernel(args...); });
}

template <class... Params>
Status launch_dependent(void (*kernel)(Params...), Grid grid, int threads, int shared_bytes, const Device&,
                        const std::type_identity_t<Params>&... args) {
  return start(grid, threads, shared_bytes, true, [&] { kernel(args...); });
}

#endif

}  // namespace cuda
}  // namespace llmcore
