#include "device_errors.cuh"

#ifdef __CUDACC__
#include <map>
#endif

namespace llmcore {
namespace cuda {
namespace {

// Static, so that a kernel captured in a CUDA graph can count on them: nothing is allocated when they are first needed.
#ifdef __CUDACC__
__device__ ErrorRecord all_records[TakeDeviceErrorsParams::kKinds];
#else
ErrorRecord all_records[TakeDeviceErrorsParams::kKinds];
#endif

__global__ void take(TakeDeviceErrorsParams p, ErrorRecord* records) {
  ErrorRecord& record = records[threadIdx.x];
  int64_t* out = p.out + threadIdx.x * TakeDeviceErrorsParams::kFields;
  const uint64_t first = record.count ? ~record.first : 0;
  out[0] = static_cast<int64_t>(record.count);
  out[1] = static_cast<int64_t>(first >> 32);
  out[2] = static_cast<int32_t>(first);
  for (int i = 0; i < 3; ++i) out[3 + i] = record.accepted[i];
  record = {};
}

}  // namespace

#ifdef __CUDACC__
// The runtime is asked once for each device and thread: the first question may load code, which a capture forbids.
Status error_records(const Device& device, ErrorRecord*& records) {
  static thread_local std::map<int, ErrorRecord*> known;
  ErrorRecord*& address = known[device.index];
  if (!address) {
    void* found = nullptr;
    if (Status error = text(cudaGetSymbolAddress(&found, all_records))) return error;
    address = static_cast<ErrorRecord*>(found);
  }
  records = address;
  return nullptr;
}
#else
Status error_records(const Device&, ErrorRecord*& records) {
  records = all_records;
  return nullptr;
}
#endif

Status take_device_errors(const TakeDeviceErrorsParams& p, const Device& device) {
  ErrorRecord* records = nullptr;
  if (Status error = error_records(device, records)) return error;
  return launch(take, {}, static_cast<int>(TakeDeviceErrorsParams::kKinds), 0, device, p, records);
}

}  // namespace cuda
}  // namespace llmcore
