// A 16-bit matrix that is a sum of float32 ones, added one after the other: what a 16-bit element cannot hold of the
// sum so far lies beside it, and only the last addition rounds it.
#pragma once
#include "scratch.h"
#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

// The sum of elements [0, n) of `out` so far, in `out` and in `rest`. Here in `rest` alone.
template <class T>
struct SplitFloat {
  using Rest = float;
  template <class Lanes>
  static LLMCORE_INLINE vf get(const T*, const Rest* rest, Lanes n) {
    return load_n(rest, n);
  }
  template <class Lanes>
  static LLMCORE_INLINE void put(T*, Rest* rest, vf x, Lanes n) {
    store_n(rest, x, n);
  }
};

// bf16 is the upper half of a float: with one more byte the sum is kept to 2^-17 of itself, 256 times finer than the
// last rounding, in 3 bytes.
template <>
struct SplitFloat<bf16> {
  using Rest = uint8_t;
  template <class Lanes>
  static LLMCORE_INLINE vf get(const bf16* out, const Rest* rest, Lanes n) {
    vh high{};
    vub low{};
    __builtin_memcpy(&high, out, n * sizeof(bf16));
    __builtin_memcpy(&low, rest, n * sizeof(Rest));
    return bit_cast<vf>(__builtin_convertvector(high, vu) << 16 | __builtin_convertvector(low, vu) << 8);
  }
  template <class Lanes>
  static LLMCORE_INLINE void put(bf16* out, Rest* rest, vf x, Lanes n) {
    const vu u = bit_cast<vu>(x), rounded = u + 0x7f + ((u >> 8) & 1);  // to nearest, ties to even
    const vu kept = x == x ? rounded : u | 0x400000u;                   // a NaN stays one
    const vh high = __builtin_convertvector(kept >> 16, vh);
    const vub low = __builtin_convertvector(kept >> 8 & 0xff, vub);
    __builtin_memcpy(out, &high, n * sizeof(bf16));
    __builtin_memcpy(rest, &low, n * sizeof(Rest));
  }
};

template <class T>
class SplitSum {
  using Split = SplitFloat<T>;

 public:
  // count: elements of out; 0 when there is but one addend.
  SplitSum(T* out, int64_t count) : out_(out), rest_(count) {}

  // out[at + i] += addend[i] for i < n. `first`: nothing has been added yet; `last`: out is rounded.
  void add(int64_t at, const float* addend, int64_t n, bool first, bool last) const {
    T* out = out_ + at;
    typename Split::Rest* rest = rest_.data() + at;
    for_row(n, [&](int64_t i, auto lanes) {
      vf sum = load_n(addend + i, lanes);
      if (!first) sum += Split::get(out + i, rest + i, lanes);
      if (last) {
        store_n(out + i, sum, lanes);
      } else {
        Split::put(out + i, rest + i, sum, lanes);
      }
    });
  }

 private:
  T* out_;
  Scratch<typename Split::Rest> rest_;
};

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
