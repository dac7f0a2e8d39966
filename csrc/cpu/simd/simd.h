// The SIMD layer: one vector of floats as wide as the instruction set, written with the compiler's vector extensions
// (GCC and Clang), so that the same kernel source serves AVX2, AVX-512 and plain C++. Intrinsics stand only where the
// extensions have no word: fp16 and bf16 conversion, and the bf16 dot product. (The maskz forms with a full mask are
// the plain instructions: GCC 12 warns of an uninitialised operand in its own definition of the plain forms.)
//
// Everything is inline in the instruction set's own namespace (see cmake/check_isa_objects.py for why).
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "llmcore/dtype.h"

#define LLMCORE_INLINE inline __attribute__((always_inline))

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

#if defined(__AVX512F__) || defined(LLMCORE_EMULATE_AVX512BF16)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// kHasBf16Dot: dot_bf16() runs at twice the rate of fma() on floats, so bf16 products are worth doing in bf16.
#if defined(__AVX512BF16__) || defined(LLMCORE_EMULATE_AVX512BF16)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));
typedef int8_t vb __attribute__((vector_size(kLanes)));
typedef uint8_t vub __attribute__((vector_size(kLanes)));

template <class To, class From>
LLMCORE_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

LLMCORE_INLINE vf set1(float x) { return x - vf{}; }
LLMCORE_INLINE vf zero() { return vf{}; }
LLMCORE_INLINE vi set1_i(int32_t x) { return x - vi{}; }
LLMCORE_INLINE vi iota() {
  vi v{};
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// ---- scalars -------------------------------------------------------------------------------------------------------

LLMCORE_INLINE float to_float(float x) { return x; }
LLMCORE_INLINE float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
LLMCORE_INLINE float to_float(int8_t x) { return static_cast<float>(x); }
LLMCORE_INLINE float to_float(f8 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80) << 24, mag = x.bits & 0x7f;
  if (mag == 0x7f) return bit_cast<float>(sign | 0x7fc00000u);
  if (mag < 8) return (sign ? -1.f : 1.f) * static_cast<float>(mag) * 0.001953125f;  // subnormal
  return bit_cast<float>(sign | ((mag << 20) + (120u << 23)));
}
LLMCORE_INLINE float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, mag = x.bits & 0x7fff;
  if (mag >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | ((mag & 0x3ff) << 13));           // inf, NaN
  if (mag < 0x400) return (sign ? -1.f : 1.f) * static_cast<float>(mag) * 5.9604644775390625e-8f;  // subnormal
  return bit_cast<float>(sign | ((mag << 13) + (112u << 23)));
#endif
}

template <class T>
T from_float(float x);
template <>
LLMCORE_INLINE float from_float<float>(float x) {
  return x;
}
template <>
LLMCORE_INLINE bf16 from_float<bf16>(float x) {  // round to nearest even, NaN stays NaN
  const uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return bf16{static_cast<uint16_t>((u >> 16) | 0x40)};
  return bf16{static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
LLMCORE_INLINE f16 from_float<f16>(float x) {
#if defined(__F16C__)
  return f16{static_cast<uint16_t>(_cvtss_sh(x, 0))};
#else
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000, mag = u & 0x7fffffff;
  if (mag > 0x7f800000) return f16{static_cast<uint16_t>(sign | 0x7e00 | ((mag >> 13) & 0x3ff))};
  if (mag >= 0x47800000) return f16{static_cast<uint16_t>(sign | 0x7c00)};
  if (mag < 0x38800000) {  // subnormal result: let float addition do the rounding
    const float shifted = bit_cast<float>(mag) + 0.5f;
    return f16{static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  return f16{static_cast<uint16_t>(sign | ((mag - (112u << 23) + 0xfff + ((mag >> 13) & 1)) >> 13))};
#endif
}

// ---- loads and stores: unaligned; the _n forms touch only the first n lanes (0 <= n <= kLanes), the rest reads 0 ----

LLMCORE_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
LLMCORE_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)  // GCC 12 widens by halves
  return (vf)_mm512_maskz_slli_epi32(
      0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#else
  vh h;
  __builtin_memcpy(&h, p, sizeof(h));
  return bit_cast<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}
LLMCORE_INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && !defined(LLMCORE_EMULATE_AVX512BF16)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
LLMCORE_INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__)  // GCC 12 widens by halves
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vf)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#elif defined(__AVX2__) && !defined(LLMCORE_EMULATE_AVX512BF16)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vb b;
  __builtin_memcpy(&b, p, sizeof(b));
  return __builtin_convertvector(b, vf);
#endif
}
LLMCORE_INLINE vf load(const f8* p) {
#if defined(__AVX512F__)
  const vu u = (vu)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__) && !defined(LLMCORE_EMULATE_AVX512BF16)
  const vu u = (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  vub b;
  __builtin_memcpy(&b, p, sizeof(b));
  const vu u = __builtin_convertvector(b, vu);
#endif
  const vu mag = u & 0x7f;
  const vf subnormal = __builtin_convertvector(bit_cast<vi>(mag), vf) * 0.001953125f;
  const vf finite = mag < 8 ? subnormal : bit_cast<vf>((mag << 20) + (120u << 23));
  return bit_cast<vf>((mag == 0x7f ? 0x7fc00000u - vu{} : bit_cast<vu>(finite)) | (u & 0x80) << 24);
}

// bf16 bits of x in the low half of each 32-bit lane, rounded to nearest even
LLMCORE_INLINE vu bf16_bits(vf x) {
  const vu u = bit_cast<vu>(x);
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return x == x ? rounded : 0x7fc0 + vu{};
}

LLMCORE_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof(x)); }
LLMCORE_INLINE void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;  // the instruction takes those for 0
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)x, kSubnormal) == 0, 1)) {
    const __m256bh h = _mm512_cvtneps_pbh((__m512)x);
    __builtin_memcpy(p, &h, sizeof(h));
    return;
  }
#endif
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(LLMCORE_EMULATE_AVX512BF16)
  const __m256i u = (__m256i)bf16_bits(x);  // GCC 12 narrows by scalar moves; two instructions do it
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(u, u), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  const vh h = __builtin_convertvector(bf16_bits(x), vh);
  __builtin_memcpy(p, &h, sizeof(h));
#endif
}
// An operand of dot_bf16(), whose instruction takes subnormal numbers for 0: they may be stored as 0.
LLMCORE_INLINE void store_operand(bf16* p, vf x) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)x);
  __builtin_memcpy(p, &h, sizeof(h));
#else
  store(p, x);
#endif
}
LLMCORE_INLINE void store_operand(float* p, vf x) { store(p, x); }
// The same of two vectors, as pairs (low[i], high[i]).
LLMCORE_INLINE vu operand_pair(vf low, vf high) {
#if defined(__AVX512BF16__)
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vu)_mm512_permutexvar_epi16(_mm512_load_si512(kPairs), halves);
#else
  return bf16_bits(low) | bf16_bits(high) << 16;
#endif
}
LLMCORE_INLINE void store(f16* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, (__m512)x, 0));
#elif defined(__F16C__) && !defined(LLMCORE_EMULATE_AVX512BF16)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, 0));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<f16>(x[i]);
#endif
}
LLMCORE_INLINE void store(f8* p, vf x) {  // rounded to nearest even; what is beyond the largest becomes the largest
  const vf a = bit_cast<vf>(bit_cast<vu>(x) & 0x7fffffffu), mag = a < kLargestF8 ? a : kLargestF8 - vf{};
  const vu u = bit_cast<vu>(mag);
  const vu normal = ((u + 0x7ffff + ((u >> 20) & 1)) >> 20) - (120u << 3);
  const vu subnormal = bit_cast<vu>(mag + 16384.f) - 0x46800000u;  // the last bit of 2^14 is worth 2^-9
  const vu bits = (mag < 0.015625f ? subnormal : normal) | (bit_cast<vu>(x) >> 24 & 0x80);
  const vub b = __builtin_convertvector(bits, vub);
  __builtin_memcpy(p, &b, sizeof(b));
}

template <class T>
LLMCORE_INLINE vf load_n(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T buf[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buf[i] = p[i];
  return load(buf);
}
template <class T>
LLMCORE_INLINE void store_n(T* p, vf x, int64_t n) {
  if (n >= kLanes) {
    store(p, x);
    return;
  }
  T buf[kLanes];
  store(buf, x);
  for (int64_t i = 0; i < n; ++i) p[i] = buf[i];
}

// Zeros past the caches: the lines that they fill are not read before. For memory that is not read again soon, and
// before others learn that it is written stream_fence() must follow.
LLMCORE_INLINE void stream_zeros(void* data, int64_t bytes) {
#if defined(__AVX2__)
  char* p = static_cast<char*>(data);
  const int64_t before = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) % sizeof(vi));
  if (before < bytes) {
    __builtin_memset(p, 0, before);
    p += before, bytes -= before;
    constexpr int64_t kBytes = sizeof(vi);
    for (; bytes >= kBytes; p += kBytes, bytes -= kBytes) {
      void* to = p;
#if defined(__AVX512F__)
      _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_setzero_si512());
#else
      for (int64_t i = 0; i < kBytes; i += 32)
        _mm256_stream_si256(static_cast<__m256i*>(to) + i / 32, _mm256_setzero_si256());
#endif
    }
  }
  __builtin_memset(p, 0, bytes);
#else
  __builtin_memset(data, 0, bytes);
#endif
}
LLMCORE_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first n lanes of x, the others 0.
LLMCORE_INLINE vf first_n(vf x, int64_t n) { return n >= kLanes ? x : iota() < static_cast<int32_t>(n) ? x : zero(); }

// Walks a row of `dim` elements in vectors: f(i, n) for lanes [i, i + n). In the main loop n is the constant kLanes (by
// its type), so that load_n and store_n lose their branch; the tail comes last, with an int64_t n < kLanes.
// f is a generic lambda: [&](int64_t i, auto n) { store_n(y + i, load_n(x + i, n), n); }
struct FullVector {
  constexpr operator int64_t() const { return kLanes; }
};
template <class F>
LLMCORE_INLINE void for_row(int64_t dim, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) f(i, FullVector{});
  if (i < dim) f(i, dim - i);
}

// ---- lanes as pairs: for element pairs stored side by side ---------------------------------------------------------

LLMCORE_INLINE vf swap_pairs(vf x) {  // 1 0 3 2 ...
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_permute_ps(0xffff, (__m512)x, 0xb1);
#elif defined(__AVX2__) && !defined(LLMCORE_EMULATE_AVX512BF16)
  return (vf)_mm256_permute_ps((__m256)x, 0xb1);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = x[i ^ 1];
  return v;
#endif
}
LLMCORE_INLINE vf repeat_low(vf x) {  // 0 0 1 1 ... kLanes/2-1 kLanes/2-1
#if defined(__AVX512F__)
  const __m512i at = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return (vf)_mm512_maskz_permutexvar_ps(0xffff, at, (__m512)x);
#elif defined(__AVX2__) && !defined(LLMCORE_EMULATE_AVX512BF16)
  return (vf)_mm256_permutevar8x32_ps((__m256)x, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = x[i / 2];
  return v;
#endif
}
LLMCORE_INLINE vf repeat_high(vf x) {  // kLanes/2 kLanes/2 ... kLanes-1 kLanes-1
#if defined(__AVX512F__)
  const __m512i at = _mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
  return (vf)_mm512_maskz_permutexvar_ps(0xffff, at, (__m512)x);
#elif defined(__AVX2__) && !defined(LLMCORE_EMULATE_AVX512BF16)
  return (vf)_mm256_permutevar8x32_ps((__m256)x, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = x[kLanes / 2 + i / 2];
  return v;
#endif
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

LLMCORE_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }  // contracted: -ffp-contract=fast
// x as a rounded number of its own: a product in it is not contracted with the addition that follows.
LLMCORE_INLINE vf rounded(vf x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));  // the compiler's own barriers take a vector apart
#elif defined(__x86_64__) && !defined(LLMCORE_EMULATE_AVX512BF16)
  asm("" : "+x"(x));
#elif defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(x);
#elif __has_builtin(__arithmetic_fence)
  return __arithmetic_fence(x);
#endif
#endif
  return x;
}
// b when either is NaN. (Of the conditional GCC makes a comparison and a blend.)
LLMCORE_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__) && !defined(LLMCORE_EMULATE_AVX512BF16)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
LLMCORE_INLINE vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__) && !defined(LLMCORE_EMULATE_AVX512BF16)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
LLMCORE_INLINE vf abs(vf a) { return bit_cast<vf>(bit_cast<vu>(a) & 0x7fffffffu); }
LLMCORE_INLINE vf copysign(vf mag, vf sign) {
  return bit_cast<vf>((bit_cast<vu>(mag) & 0x7fffffffu) | (bit_cast<vu>(sign) & 0x80000000u));
}
LLMCORE_INLINE vf sqrt(vf a) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_sqrt_ps(0xffff, (__m512)a);
#elif defined(__AVX2__) && !defined(LLMCORE_EMULATE_AVX512BF16)
  return (vf)_mm256_sqrt_ps((__m256)a);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(a[i]);
  return v;
#endif
}

LLMCORE_INLINE bool any_above(vf a, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)set1(limit), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__) && !defined(LLMCORE_EMULATE_AVX512BF16)
  return _mm256_movemask_ps((__m256)(a > limit)) != 0;
#else
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= a[i] > limit;
  return any;
#endif
}

// Lanes joined by a fixed tree, so that a sum does not depend on the compiler: the lower half of the vector with the
// upper half, until one lane is left.
template <int Lanes>
struct Vector {
  typedef float type __attribute__((vector_size(Lanes * 4)));
};
template <int Lanes, class V, class F>
LLMCORE_INLINE float reduce(V x, const F& f) {
  if constexpr (Lanes == 2) {
    return f(x[0], x[1]);
  } else {
    typename Vector<Lanes / 2>::type low, high;
    __builtin_memcpy(&low, &x, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof(low), sizeof(high));
    return reduce<Lanes / 2>(f(low, high), f);
  }
}
LLMCORE_INLINE float reduce_sum(vf x) {
  return reduce<kLanes>(x, [](auto a, auto b) { return a + b; });
}
LLMCORE_INLINE float reduce_max(vf x) {
  return reduce<kLanes>(x, [](auto a, auto b) { return a > b ? a : b; });
}

// Sums over a row, Count of them: f(i, n, sums) adds what elements [i, i + n) give to the vectors sums[Count]. They go
// into four sets that are joined at the end: in one, each addition would wait for the one before it.
template <int Count, class F>
LLMCORE_INLINE void sum_row(int64_t dim, float (&total)[Count], const F& f) {
  constexpr int kSets = 4;
  vf sums[kSets][Count] = {};
  int64_t i = 0;
  for (; i + kSets * kLanes <= dim; i += kSets * kLanes)
    for (int set = 0; set < kSets; ++set) f(i + set * kLanes, FullVector{}, sums[set]);
  for_row(dim - i, [&](int64_t j, auto n) { f(i + j, n, sums[0]); });
  for (int c = 0; c < Count; ++c) total[c] = reduce_sum((sums[0][c] + sums[1][c]) + (sums[2][c] + sums[3][c]));
}

// 2^f for |f| <= 0.5, relative error 1.7e-7: the polynomial of Cephes' exp2f.
LLMCORE_INLINE vf exp2_fraction(vf f) {
  vf p = fma(set1(1.535336188319500e-4f), f, set1(1.339887440266574e-3f));
  p = fma(p, f, set1(9.618437357674640e-3f));
  p = fma(p, f, set1(5.550332471162809e-2f));
  p = fma(p, f, set1(2.402264791363012e-1f));
  p = fma(p, f, set1(6.931472028550421e-1f));
  return fma(p, f, set1(1.f));
}
constexpr float kRoundMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds a float to the nearest integer

// p * 2^n for p near 1 and an integer n in [-152, 130]; overflows to inf, underflows gradually.
LLMCORE_INLINE vf times_power(vf p, vf n) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  const vi i = bit_cast<vi>(n + kRoundMagic) - 0x4b400000, half = i >> 1;  // in two factors: each a normal number
  return p * bit_cast<vf>((half + 127) << 23) * bit_cast<vf>((i - half + 127) << 23);
#endif
}
// x in [low, high]; NaN stays NaN.
LLMCORE_INLINE vf clamp(vf x, float low, float high) { return min(set1(high), max(set1(low), x)); }

// 2^x, relative error below 2.5e-7; overflows to inf, underflows gradually, NaN stays NaN.
LLMCORE_INLINE vf exp2(vf x) {
  const vf c = clamp(x, -152.f, 130.f), n = (c + kRoundMagic) - kRoundMagic;
  return times_power(exp2_fraction(c - n), n);
}

// 2^x for x <= 0 as softmax needs it: results below 2^-126 are exactly 0, -inf included. NaN stays NaN.
LLMCORE_INLINE vf exp2_nonpositive(vf x) {
  const vf c = x < -127.f ? set1(-127.f) : x;
  const vf shifted = c + kRoundMagic;
  const vf p = exp2_fraction(c - (shifted - kRoundMagic));
  return p * bit_cast<vf>((bit_cast<vu>(shifted) << 23) + (127u << 23));  // n = -127 makes the factor 0
}

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// e^x, relative error below 1e-7 (measured on every 131st float) where there is a fused multiply-add: x * log2(e) - n
// is exact then, and the rest of log2(e) comes after it. Without one the error grows with |x|, to 2.8e-6. Overflow,
// underflow and NaN as in exp2.
LLMCORE_INLINE vf exp(vf x) {
  constexpr float kLog2eRest = 1.9259629911e-8f;
  const vf c = clamp(x, -105.f, 90.f), n = fma(c, set1(kLog2e), set1(kRoundMagic)) - kRoundMagic;
  return times_power(exp2_fraction(fma(c, set1(kLog2eRest), fma(c, set1(kLog2e), -n))), n);
}
LLMCORE_INLINE vf sigmoid(vf x) { return 1.f / (1.f + exp(-x)); }

// tanh for |x| < 0.625: Cephes' odd polynomial.
LLMCORE_INLINE vf tanh_near_zero(vf x) {
  const vf z = x * x;
  vf p = fma(set1(-5.70498872745e-3f), z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  return fma(p * z, x, x);
}
// tanh, relative error below 4e-7: from 0.625 on, 1 - 2 / (e^2|x| + 1).
LLMCORE_INLINE vf tanh(vf x) {
  const vf a = abs(x);
  const vf far = copysign(1.f - 2.f / (exp2(a * (2.f * kLog2e)) + 1.f), x);
  return a < 0.625f ? tanh_near_zero(x) : (x == x ? far : x);
}
// tanh, and its derivative without the cancellation of 1 - tanh^2: with q = 1 - tanh|x|, it is q (2 - q).
LLMCORE_INLINE vf tanh_and_slope(vf x, vf& slope) {
  const vf a = abs(x), u = exp2(a * (-2.f * kLog2e)), q = 2.f * u / (1.f + u);
  const vf t = a < 0.625f ? tanh_near_zero(x) : (x == x ? copysign(1.f - q, x) : x);
  slope = a < 0.625f ? 1.f - t * t : q * (2.f - q);
  return t;
}

// erf, absolute error below 1.6e-7 and relative error below 1.9e-7 (measured on every fifth float up to 6, see also
// tests/ops/test_glu.py).
// Below 1: x times a polynomial in x^2; above: 1 - 2^p(|x|), where p is log2(erfc) fitted by weighted least squares at
// Chebyshev nodes; from 4 on erf is 1 to float precision.
LLMCORE_INLINE vf erf(vf x) {
  const vf z = x * x;
  vf near = fma(set1(7.847259258e-5f), z, set1(-8.008189034e-4f));
  near = fma(near, z, set1(5.188099109e-3f));
  near = fma(near, z, set1(-2.685369179e-2f));
  near = fma(near, z, set1(1.128358245e-1f));
  near = fma(near, z, set1(-3.761262596e-1f));
  near = fma(near, z, set1(1.128379107f));
  const vf a = min(abs(x), set1(4.f));
  vf p = fma(set1(2.691372356e-4f), a, set1(-4.254429601e-3f));
  p = fma(p, a, set1(3.151092306e-2f));
  p = fma(p, a, set1(-1.487583816e-1f));
  p = fma(p, a, set1(-9.206449986e-1f));
  p = fma(p, a, set1(-1.626045585f));
  p = fma(p, a, set1(-4.933473538e-4f));
  const vf far = copysign(1.f - exp2(p), x);
  return abs(x) < 1.f ? near * x : (x == x ? far : x);
}

// ---- bf16 products --------------------------------------------------------------------------------------------------

// acc[i] + a[i].lo * b[i].lo + a[i].hi * b[i].hi, where each 32-bit lane of a and b holds two bf16.
LLMCORE_INLINE vf dot_bf16(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  acc = fma(bit_cast<vf>(a & 0xffff0000u), bit_cast<vf>(b & 0xffff0000u), acc);
  return fma(bit_cast<vf>(a << 16), bit_cast<vf>(b << 16), acc);
#endif
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
