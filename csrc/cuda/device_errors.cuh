// For kernels that look at data: an error is counted, and the first one kept (llmcore/device_errors.h).
#pragma once
#include "launch.cuh"
#include "llmcore/device_errors.h"

namespace llmcore {
namespace cuda {

// The records of the device, which is the current one; one for each kind.
Status error_records(const Device& device, ErrorRecord*& records);

PTX_DEVICE int64_t cut(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

PTX_DEVICE void report_error(ErrorRecord* records, DeviceError kind, int64_t index, int64_t value, int64_t accepted0,
                             int64_t accepted1, int64_t accepted2) {
  ErrorRecord& record = records[static_cast<int>(kind)];
  if (ptx::atomic_add(&record.count, 1) == 0) {  // one thread alone
    record.accepted[0] = accepted0;
    record.accepted[1] = accepted1;
    record.accepted[2] = accepted2;
  }
  const uint64_t high = static_cast<uint64_t>(cut(index, 0, UINT32_MAX)),
                 low = static_cast<uint32_t>(cut(value, INT32_MIN, INT32_MAX));
  ptx::atomic_max(&record.first, ~(high << 32 | low));
}

}  // namespace cuda
}  // namespace llmcore
