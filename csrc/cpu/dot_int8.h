// Sums of products of unsigned weights with int8 activations, exact in int32 on every instruction set.
#pragma once
#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

#if defined(__AVX512VNNI__)
#define LLMCORE_DOT_VNNI 1
#elif defined(__AVX2__) && !defined(LLMCORE_EMULATE_AVX512BF16)
#define LLMCORE_DOT_PAIRS 1
#endif

// kDotSubtracts: DotInt8<8>'s sums are of (w - 128) * a. Such weights pass as signed ones where products of pairs are
// summed in 16 bits, which are too few for unsigned ones.
#if defined(LLMCORE_DOT_PAIRS)
constexpr bool kDotSubtracts = true;
#else
constexpr bool kDotSubtracts = false;
#endif

#if defined(LLMCORE_DOT_PAIRS)
// w * a of adjacent bytes, the two added in 16 bits: |w| * |a| <= 128 * 127 keeps them below 2^15.
LLMCORE_INLINE vi add_pairs(vu w, vi a) {
#if defined(__AVX512BW__)
  return (vi)_mm512_maddubs_epi16((__m512i)w, (__m512i)a);
#else
  return (vi)_mm256_maddubs_epi16((__m256i)w, (__m256i)a);
#endif
}
LLMCORE_INLINE vi add_16(vi a, vi b) {
  typedef int16_t v16 __attribute__((vector_size(kLanes * 4)));
  return bit_cast<vi>(bit_cast<v16>(a) + bit_cast<v16>(b));
}
LLMCORE_INLINE vi add_pairs_16(vi a) {
#if defined(__AVX512BW__)
  return (vi)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi16(1));
#else
  return (vi)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi16(1));
#endif
}
// (w - 128) * a as |w - 128| * (a with that sign)
LLMCORE_INLINE vi add_pairs_signed(vu w, vi a) {
#if defined(__AVX512BW__)
  const __m512i s = (__m512i)(w ^ 0x80808080u);
  const __m512i signed_a = _mm512_mask_sub_epi8((__m512i)a, _mm512_movepi8_mask(s), _mm512_setzero_si512(), (__m512i)a);
  return add_pairs((vu)_mm512_abs_epi8(s), (vi)signed_a);
#else
  const __m256i s = (__m256i)(w ^ 0x80808080u);
  return add_pairs((vu)_mm256_abs_epi8(s), (vi)_mm256_sign_epi8((__m256i)a, s));
#endif
}
#endif

// 4 activations in every lane
LLMCORE_INLINE vi four(const int8_t* a) {
  int32_t v;
  __builtin_memcpy(&v, a, sizeof(v));
  return set1_i(v);
}

// acc[lane] + the sum over Count groups of 4 weights: w[g] holds those of each lane, a + 4 * g the 4 activations.
template <int Bits, int Count>
LLMCORE_INLINE vi dot_int8(vi acc, const vu* w, const int8_t* a) {
#if defined(LLMCORE_DOT_VNNI)
#pragma GCC unroll 8
  for (int g = 0; g < Count; ++g) acc = (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w[g], (__m512i)four(a + 4 * g));
#elif defined(LLMCORE_DOT_PAIRS)
  // as many sums of pairs as 16 bits hold, 2 * 127 * (2^Bits - 1) each, before they are widened
  constexpr int kInt16 = Bits == 4 ? 8 : Bits == 5 ? 4 : Bits == 6 ? 2 : 1;
  constexpr int kStep = kInt16 < Count ? kInt16 : Count;
#pragma GCC unroll 8
  for (int g = 0; g < Count; g += kStep) {
    vi pairs = Bits == 8 ? add_pairs_signed(w[g], four(a + 4 * g)) : add_pairs(w[g], four(a + 4 * g));
#pragma GCC unroll 8
    for (int i = 1; i < kStep; ++i) pairs = add_16(pairs, add_pairs(w[g + i], four(a + 4 * (g + i))));
    acc += add_pairs_16(pairs);
  }
#else
  for (int g = 0; g < Count; ++g)
    for (int i = 0; i < 4; ++i) acc += bit_cast<vi>((w[g] >> (8 * i)) & 0xffu) * set1_i(a[4 * g + i]);
#endif
  return acc;
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
