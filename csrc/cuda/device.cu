// What launchers ask the CUDA runtime about a device.
#include "launch.cuh"

namespace llmcore {
namespace cuda {

#ifdef __CUDACC__
Status describe(int index, Device& device) {
  if (Status error = text(cudaSetDevice(index))) return error;
  return text(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
}
#else
Status describe(int, Device& device) {
  device.multiprocessors = 3;  // few, so that small grids wrap around
  return nullptr;
}
#endif

}  // namespace cuda
}  // namespace llmcore
