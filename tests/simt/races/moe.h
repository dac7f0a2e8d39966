// What the cases of the mixture-of-experts kernels share.
#pragma once
#include "case.h"

namespace races {

// n int32, held by a tensor of float32, which compares their bits as (subnormal) numbers: exactly, by kExact.
inline Tensor integers(int64_t n) { return Tensor(DType::f32, n); }
constexpr double kExact = 1e-12;

template <class F>
Tensor integers(int64_t n, const F& value) {
  Tensor t = integers(n);
  for (int64_t i = 0; i < n; ++i) t.as<int32_t>()[i] = static_cast<int32_t>(value(i));
  return t;
}

}  // namespace races
