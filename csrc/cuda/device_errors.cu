#include "device_errors.cuh"

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
Status error_records(ErrorRecord*& records) {
  void* address = nullptr;
  if (Status error = text(cudaGetSymbolAddress(&address, all_records))) return error;
  records = static_cast<ErrorRecord*>(address);
  return nullptr;
}
#else
Status error_records(ErrorRecord*& records) {
  records = all_records;
  return nullptr;
}
#endif

Status take_device_errors(const TakeDeviceErrorsParams& p, const Device& device) {
  ErrorRecord* records = nullptr;
  if (Status error = error_records(records)) return error;
  return launch(take, {}, static_cast<int>(TakeDeviceErrorsParams::kKinds), 0, device, p, records);
}

}  // namespace cuda
}  // namespace llmcore
