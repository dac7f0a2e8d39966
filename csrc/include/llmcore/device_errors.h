// What a CUDA kernel finds wrong in data that no binding looked at, because the host would have had to wait. Kernels
// count it in a record that every device has for each kind of error; llmcore.ops.check_device_errors reads the records.
#pragma once
#include <cstdint>

#include "llmcore/cuda.h"
#include "llmcore/isa.h"

namespace llmcore {

// One entry per message in llmcore/ops/device_errors.py, in its order.
enum class DeviceError : int { target_outside_vocabulary, count };

struct ErrorRecord {
  uint64_t count;
  // The lowest index, and the value there: the complement of index << 32 | value, so that an empty record is all 0 and
  // one atomic maximum keeps both. Indices are cut to 32 bits and values to an int32, at its ends.
  uint64_t first;
  int64_t accepted[3];  // what the message gives as accepted, from the first call that found an error
};

struct TakeDeviceErrorsParams {
  int64_t* out;  // (kinds, kFields): count, index, value, accepted
  static constexpr int64_t kKinds = static_cast<int64_t>(DeviceError::count), kFields = 6;
};

// Moves the records of the device to `out` and clears them, in the order of the stream. Errors on the CPU are raised at
// once, so there `out` is zeroed.
LLMCORE_CPU_KERNEL(take_device_errors, TakeDeviceErrorsParams)
LLMCORE_CUDA_KERNEL(take_device_errors, TakeDeviceErrorsParams)

}  // namespace llmcore
