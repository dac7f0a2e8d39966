// The arithmetic of token sampling, the same bits on every device (llmcore/reference/sampling.py repeats it in torch).
//
// Every operation below is exact, or rounded once by IEEE rules: no library function, no product that a compiler could
// fuse with the addition behind it (where one is wanted, fma is spelled out), and sums of probabilities in 64-bit
// integers, whose order does not matter. Functions are templates over a policy M (its float F, int32 I, uint32 U), so
// that the CPU kernel can run them on SIMD vectors: see Scalar.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LLMCORE_MATH static __host__ __device__ __forceinline__
#else
#define LLMCORE_MATH static inline __attribute__((always_inline))
#endif

namespace llmcore {
namespace sampling {

struct Scalar {
  using F = float;
  using I = int32_t;
  using U = uint32_t;
  LLMCORE_MATH F set(float x) { return x; }
#ifdef __CUDA_ARCH__
  LLMCORE_MATH F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
  LLMCORE_MATH U bits(F x) { return __float_as_uint(x); }
  LLMCORE_MATH F from_bits(U x) { return __uint_as_float(x); }
  LLMCORE_MATH I floor_log2(U x) { return 31 - __clz(static_cast<int>(x)); }
#else
  LLMCORE_MATH F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  LLMCORE_MATH U bits(F x) {
    U u;
    __builtin_memcpy(&u, &x, sizeof u);
    return u;
  }
  LLMCORE_MATH F from_bits(U x) {
    F f;
    __builtin_memcpy(&f, &x, sizeof f);
    return f;
  }
  LLMCORE_MATH I floor_log2(U x) { return 31 - __builtin_clz(x); }
#endif
  LLMCORE_MATH F to_float(I x) { return static_cast<F>(x); }
};

// ---- order ---------------------------------------------------------------------------------------------------------

// Rises with x; equal for both zeros.
template <class M>
LLMCORE_MATH typename M::U ordered(typename M::F x) {
  const typename M::U u = M::bits(x + 0.f);
  return u ^ (-(u >> 31) | 0x80000000u);
}
LLMCORE_MATH float from_ordered(uint32_t key) {
  return Scalar::from_bits(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}
constexpr uint32_t kOrderedMinusInf = 0x007fffffu, kOrderedInf = 0xff800000u;

// The most likely tokens of a row, in the order of falling logits and, among equals, rising ids: up to this one.
struct Cut {
  uint32_t key, index;
};
constexpr Cut kKeepAll{0, 0xffffffffu};
LLMCORE_MATH bool kept(const Cut& cut, uint32_t key, uint32_t index) {
  return key > cut.key || (key == cut.key && index <= cut.index);
}

// ---- exp, log ------------------------------------------------------------------------------------------------------

constexpr float kGreedyTemperature = 1e-30f;  // its reciprocal is finite

// e^x for x <= 0, relative error below 1.5e-7, e^0 = 1; 0 below -86 and for NaN. 2^f by the polynomial of Cephes'
// exp2f.
template <class M>
LLMCORE_MATH typename M::F exp_nonpositive(typename M::F x) {
  using F = typename M::F;
  const F shifted = M::fma(x, M::set(1.44269502f), M::set(12582912.f));  // 1.5 * 2^23: rounded to an integer
  const F n = shifted - 12582912.f;
  const F f = M::fma(x, M::set(1.92596303e-8f), M::fma(x, M::set(1.44269502f), -n));
  F p = M::fma(M::set(1.535336188319500e-4f), f, M::set(1.339887440266574e-3f));
  p = M::fma(p, f, M::set(9.618437357674640e-3f));
  p = M::fma(p, f, M::set(5.550332471162809e-2f));
  p = M::fma(p, f, M::set(2.402264791363012e-1f));
  p = M::fma(p, f, M::set(6.931472028550421e-1f));
  p = M::fma(p, f, M::set(1.f));
  const F e = M::from_bits(M::bits(p) + (M::bits(shifted) << 23));
  return x >= -86.f ? e : M::set(0.f);
}

// log((1 + t) * 2^exponent) for sqrt(1/2) <= 1 + t <= sqrt(2), by the polynomial of Cephes' logf: with exponent 0 its
// relative error is below 1.5e-7, else its absolute error is below 1e-7 of the exponent's part.
template <class M>
LLMCORE_MATH typename M::F log_of(typename M::F t, typename M::F exponent) {
  using F = typename M::F;
  F p = M::fma(M::set(7.0376836292e-2f), t, M::set(-1.1514610310e-1f));
  p = M::fma(p, t, M::set(1.1676998740e-1f));
  p = M::fma(p, t, M::set(-1.2420140846e-1f));
  p = M::fma(p, t, M::set(1.4249322787e-1f));
  p = M::fma(p, t, M::set(-1.6668057665e-1f));
  p = M::fma(p, t, M::set(2.0000714765e-1f));
  p = M::fma(p, t, M::set(-2.4999993993e-1f));
  p = M::fma(p, t, M::set(3.3333331174e-1f));
  const F square = t * t;
  const F rest = M::fma(p * t, square, square * -0.5f);
  return M::fma(exponent, M::set(0.693359375f), t + M::fma(exponent, M::set(-2.12194440e-4f), rest));
}

// Of a normal number.
LLMCORE_MATH float log(float x) {
  const uint32_t u = Scalar::bits(x);
  int32_t exponent = static_cast<int32_t>(u >> 23) - 127;
  float mantissa = Scalar::from_bits((u & 0x007fffffu) | 0x3f800000u);
  if (mantissa > 1.41421354f) {
    mantissa *= 0.5f;
    ++exponent;
  }
  return log_of<Scalar>(mantissa - 1.f, static_cast<float>(exponent));
}

// ---- sums of probabilities -----------------------------------------------------------------------------------------

// 0 <= e <= 1 in units of 2^-40, cut off. 2^22 of them fit 63 bits, and what 2^18 lose together is below 2^-22.
constexpr float kOne = 1099511627776.f;
LLMCORE_MATH uint64_t fixed_point(float e) { return static_cast<uint64_t>(static_cast<int64_t>(e * kOne)); }

// The least sum that reaches the share p < 1 of `total`.
LLMCORE_MATH uint64_t share_of(float p, uint64_t total) {
  const double share = static_cast<double>(static_cast<int64_t>(total)) * static_cast<double>(p);
  if (!(share > 1.)) return 1;
  const uint64_t floor = static_cast<uint64_t>(static_cast<int64_t>(share));
  return floor + (static_cast<double>(static_cast<int64_t>(floor)) < share ? 1 : 0);
}

// log_softmax of the token whose logit is x, where the largest is `max` and the fixed-point sum of e^(logit - max) is
// `total`.
LLMCORE_MATH float log_probability(float x, float max, uint64_t total) {
  const float sum = static_cast<float>(static_cast<int64_t>(total)) * (1.f / kOne);
  return (x - max) - log(sum);
}

// ---- noise ---------------------------------------------------------------------------------------------------------

struct Random4 {
  uint32_t x[4];
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): 128 random bits that are a
// function of seed and counter.
LLMCORE_MATH Random4 philox(uint64_t seed, uint64_t position, uint32_t token_group) {
  uint32_t c[4] = {token_group, static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ key0;
    c[1] = static_cast<uint32_t>(b);
    c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ key1;
    c[3] = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// An exponential variable from 32 random bits: -log(u), where u is one of the 2^31 odd multiples of 2^-32. From 2^-32
// to 22.2, relative error below 2e-7.
template <class M>
LLMCORE_MATH typename M::F exponential(typename M::U random) {
  using F = typename M::F;
  using I = typename M::I;
  using U = typename M::U;
  const U odd = random | 1u;
  const I log2 = M::floor_log2(odd);
  const U top = odd << (U)(31 - log2);  // the leading bit is bit 31
  // u = (1 + t) * 2^exponent; t is a rounded integer times a power of 2, so that it is exact to its last bit near 0
  const F below_one = M::to_float((I)(0u - top)) * -2.3283064365386963e-10f;         // 2^-32
  const F above_one = M::to_float((I)(top - 0x80000000u)) * 4.656612873077393e-10f;  // 2^-31
  const auto is_below = top >= 0xB504F334u;                                          // sqrt(1/2) * 2^32
  const F t = is_below ? below_one : above_one;
  const I exponent = is_below ? log2 - 31 : log2 - 32;
  return -log_of<M>(t, M::to_float(exponent));
}

// The race that decides the draw: the token of the smallest exponential / e wins, with probability proportional to e
// (the Gumbel-max trick, in another scale). Smaller for the winner; the lower id wins a tie.
LLMCORE_MATH uint64_t race_entry(float time, uint32_t index) {
  return static_cast<uint64_t>(Scalar::bits(time)) << 32 | index;
}
constexpr uint64_t kNoEntry = ~uint64_t{0};

// ---- penalties -----------------------------------------------------------------------------------------------------

// Of a token that was seen, `count` times in the output.
LLMCORE_MATH float penalised(float x, uint32_t count, float repetition, float presence, float frequency) {
  x = x > 0.f ? x / repetition : x * repetition;
  if (count > 0) x = Scalar::fma(-frequency, static_cast<float>(count), x) - presence;
  return x;
}

}  // namespace sampling
}  // namespace llmcore
