#include "llmcore/device_errors.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

void take_device_errors(const TakeDeviceErrorsParams& p, const Parallel&) {
  __builtin_memset(p.out, 0, TakeDeviceErrorsParams::kKinds * TakeDeviceErrorsParams::kFields * sizeof(int64_t));
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
