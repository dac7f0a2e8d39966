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

#ifdef __CUDACC__

inline Status text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <class... Params>
Status launch(void (*kernel)(Params...), Grid grid, int threads, int shared_bytes, const Device& device,
              const std::type_identity_t<Params>&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  if (shared_bytes > 48 * 1024)  // more must be asked for
    if (Status error = text(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)))
      return error;
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(device.stream)>>>(args...);
  return text(cudaGetLastError());
}

#else

template <class... Params>
Status launch(void (*kernel)(Params...), Grid grid, int threads, int shared_bytes, const Device&,
              const std::type_identity_t<Params>&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  static thread_local std::string message;
  try {
    simt::launch(
        simt::Dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)),
        static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes), [&] { kernel(args...); });
  } catch (const simt::Error& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

#endif

}  // namespace cuda
}  // namespace llmcore
