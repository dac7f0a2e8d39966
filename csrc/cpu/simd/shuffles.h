// Elements that change places between vectors: interleaving, transposing, results across lanes for many vectors at
// once.
#pragma once
#include "simd/simd.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

// a0 b0 a1 b1 ... from the lower (Half = 0) or upper (Half = 1) halves of a and b
template <int Half>
LLMCORE_INLINE vu zip(vu a, vu b) {
  constexpr int h = Half * kLanes / 2;
#if defined(__AVX512F__) || defined(LLMCORE_EMULATE_AVX512BF16)
  const vi mask = {h,     h + 16, h + 1, h + 17, h + 2, h + 18, h + 3, h + 19,
                   h + 4, h + 20, h + 5, h + 21, h + 6, h + 22, h + 7, h + 23};
#elif defined(__AVX2__)
  const vi mask = {h, h + 8, h + 1, h + 9, h + 2, h + 10, h + 3, h + 11};
#else
  const vi mask = {h, h + 4, h + 1, h + 5};
#endif
#if defined(__clang__)
  vu r;
  for (int i = 0; i < kLanes; ++i) r[i] = mask[i] < kLanes ? a[mask[i]] : b[mask[i] - kLanes];
  return r;
#else
  return __builtin_shuffle(a, b, mask);
#endif
}

// Transposes a kLanes x kLanes matrix of 32-bit elements held in rows[].
#if defined(__AVX512F__)
// Within 128-bit lanes first, then whole lanes: shuffles that cost half as much as those across a register.
LLMCORE_INLINE void transpose(vu (&rows)[kLanes]) {
  __m512i pairs[16], quads[16], eights[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_maskz_unpacklo_epi32(0xffff, (__m512i)rows[i], (__m512i)rows[i + 1]);
    pairs[i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, (__m512i)rows[i], (__m512i)rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {  // quads[i + c]: columns c, c + 4, c + 8, c + 12 of rows i .. i + 3
      quads[i + 2 * j] = _mm512_maskz_unpacklo_epi64(0xff, pairs[i + j], pairs[i + j + 2]);
      quads[i + 2 * j + 1] = _mm512_maskz_unpackhi_epi64(0xff, pairs[i + j], pairs[i + j + 2]);
    }
  for (int c = 0; c < 4; ++c)
    for (int i = 0; i < 16; i += 8) {  // even, then odd lanes of rows i .. i + 7
      eights[i + c] = _mm512_maskz_shuffle_i32x4(0xffff, quads[i + c], quads[i + c + 4], 0x88);
      eights[i + c + 4] = _mm512_maskz_shuffle_i32x4(0xffff, quads[i + c], quads[i + c + 4], 0xdd);
    }
  for (int c = 0; c < 8; ++c) {
    rows[c] = (vu)_mm512_maskz_shuffle_i32x4(0xffff, eights[c], eights[c + 8], 0x88);
    rows[c + 8] = (vu)_mm512_maskz_shuffle_i32x4(0xffff, eights[c], eights[c + 8], 0xdd);
  }
}
#else  // log2(kLanes) rounds of perfect shuffles
LLMCORE_INLINE void transpose(vu (&rows)[kLanes]) {
  vu next[kLanes];
  for (int round = 1; round < kLanes; round *= 2) {
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = zip<0>(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = zip<1>(rows[i], rows[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}
#endif

// Lane i of the result is what meet, associative and commutative, makes of v[i]'s lanes: kLanes results across lanes
// for the price of two. v is overwritten.
template <class Meet>
LLMCORE_INLINE vf meet_each(vf (&v)[kLanes], const Meet& meet) {
#if defined(__AVX512F__)
  // Vectors meet in pairs, within 128 bits first: each round adds two shuffles of a pair and leaves half as many.
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 x = (__m512)v[2 * i], y = (__m512)v[2 * i + 1];
    a[i] = (__m512)meet((vf)_mm512_maskz_unpacklo_ps(0xffff, x, y), (vf)_mm512_maskz_unpackhi_ps(0xffff, x, y));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d x = (__m512d)a[2 * i], y = (__m512d)a[2 * i + 1];
    b[i] = (__m512)meet((vf)_mm512_maskz_unpacklo_pd(0xff, x, y), (vf)_mm512_maskz_unpackhi_pd(0xff, x, y));
  }
  for (int i = 0; i < 2; ++i)
    c[i] = (__m512)meet((vf)_mm512_maskz_shuffle_f32x4(0xffff, b[2 * i], b[2 * i + 1], 0x88),
                        (vf)_mm512_maskz_shuffle_f32x4(0xffff, b[2 * i], b[2 * i + 1], 0xdd));
  return meet((vf)_mm512_maskz_shuffle_f32x4(0xffff, c[0], c[1], 0x88),
              (vf)_mm512_maskz_shuffle_f32x4(0xffff, c[0], c[1], 0xdd));
#else  // the halves of two vectors, interleaved
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) {
      const vu a = bit_cast<vu>(v[i]), b = bit_cast<vu>(v[i + half]);
      v[i] = meet(bit_cast<vf>(zip<0>(a, b)), bit_cast<vf>(zip<1>(a, b)));
    }
  return v[0];
#endif
}
LLMCORE_INLINE vf sum_each(vf (&v)[kLanes]) {
  return meet_each(v, [](vf a, vf b) { return a + b; });
}
LLMCORE_INLINE vf max_each(vf (&v)[kLanes]) {
  return meet_each(v, [](vf a, vf b) { return max(a, b); });
}

// Pairs (a[i], b[i]) of 2 * kLanes bf16 each: the first kLanes in lo.
LLMCORE_INLINE void pair_up(const bf16* a, const bf16* b, vu& lo, vu& hi) {
#if defined(__AVX512BW__)
  const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  lo = (vu)_mm512_permutex2var_epi16(x, low, y);
  hi = (vu)_mm512_permutex2var_epi16(x, high, y);
#else
  vh even[2], odd[2];
  __builtin_memcpy(even, a, sizeof(even));
  __builtin_memcpy(odd, b, sizeof(odd));
  lo = __builtin_convertvector(even[0], vu) | __builtin_convertvector(odd[0], vu) << 16;
  hi = __builtin_convertvector(even[1], vu) | __builtin_convertvector(odd[1], vu) << 16;
#endif
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
