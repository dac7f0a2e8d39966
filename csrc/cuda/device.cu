// What launchers ask the CUDA runtime about a device and its kernels. The answers never change, so they are kept.
#include "launch.cuh"

#ifdef __CUDACC__
#include <atomic>
#include <map>
#include <utility>
#endif

namespace llmcore {
namespace cuda {

#ifdef __CUDACC__
namespace {

struct Attributes {
  int multiprocessors, shared_bytes;
};

Status ask(int index, Attributes& a) {
  if (Status error = text(cudaDeviceGetAttribute(&a.multiprocessors, cudaDevAttrMultiProcessorCount, index)))
    return error;
  return text(cudaDeviceGetAttribute(&a.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
}

// Both numbers in one word, so that a thread sees all of an answer or none: 0.
Status attributes(int index, Attributes& a) {
  constexpr int kMost = 64;  // devices whose answers are kept
  static std::atomic<uint64_t> kept[kMost];
  const bool keeps = index >= 0 && index < kMost;
  if (const uint64_t known = keeps ? kept[index].load(std::memory_order_relaxed) : 0) {
    a = {static_cast<int>(known >> 32), static_cast<int>(known & 0xffffffffu)};
    return nullptr;
  }
  const Status error = ask(index, a);
  if (!error && keeps)
    kept[index].store(static_cast<uint64_t>(a.multiprocessors) << 32 | static_cast<uint32_t>(a.shared_bytes),
                      std::memory_order_relaxed);
  return error;
}

KernelFacts ask(const void* kernel, const Device& device) {
  // For all launches of the kernel and all threads the same, so that none takes back what another was given.
  if (Status error =
          text(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes)))
    return {error, false};
  // By the code, not by the device: a newer device may run what its driver made of the PTX for sm_80.
  cudaFuncAttributes attributes{};
  const Status error = text(cudaFuncGetAttributes(&attributes, kernel));
  return {error, attributes.ptxVersion >= 90};
}

}  // namespace

Status describe(int index, Device& device) {
  if (Status error = text(cudaSetDevice(index))) return error;
  Attributes a{};
  if (Status error = attributes(index, a)) return error;
  device.index = index;
  device.multiprocessors = a.multiprocessors;
  device.shared_bytes = a.shared_bytes;
  return nullptr;
}

KernelFacts prepare(const void* kernel, const Device& device) {
  static thread_local std::map<std::pair<const void*, int>, KernelFacts> known;
  const std::pair<const void*, int> key{kernel, device.index};
  if (const auto found = known.find(key); found != known.end()) return found->second;
  const KernelFacts facts = ask(kernel, device);
  if (!facts.error) known.emplace(key, facts);
  return facts;
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
