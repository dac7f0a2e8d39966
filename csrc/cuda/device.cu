// What launchers ask the CUDA runtime about a device.
#include "launch.cuh"

namespace llmcore {
namespace cuda {

#ifdef __CUDACC__
Status describe(int index, Device& device) {
  if (Status error = text(cudaSetDevice(index))) return error;
  if (Status error = text(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index)))
    return error;
  return text(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
}
#else
Status describe(int, Device& device) {
  device.multiprocessors = 3;  // few, so that small grids wrap around
  device.shared_bytes = static_cast<int>(simt::options().shared_bytes);
  return nullptr;
}
#endif

}  // namespace cuda
}  // namespace llmcore
