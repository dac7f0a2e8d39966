// What one warp of decode attention does with a tile: scores, online softmax, sums; and what it leaves at the end.
#pragma once
#include <type_traits>

#include "attention_decode_tile.cuh"

namespace llmcore {
namespace cuda {
namespace decode {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f, kInfinity = __builtin_inff();

// What the launcher decides.
struct Plan {
  int tasks;       // tiles of rows, for each KV head and split
  int row_tiles;   // of each sequence; 0: as many as each has rows for, which cu_q tells
  int row_stride;  // to a CTA's next tile
  int group;       // query heads of a KV head
  int splits;      // of the keys; with 1 the output is written at once
  bool q_vectors, k_vectors, v_vectors, out_vectors;  // rows can be moved 16 bytes at a time
  int64_t width;                                      // of a row of partial sums: v_head_dim to a multiple of 16
  float* sums;                                        // (total_q, heads, splits, width)
  RowStats* stats;                                    // (total_q, heads, splits)
};

// A row's output is its sum times this: 1 / its total, the sink's share included.
PTX_DEVICE float output_factor(const RowStats& row, float sink) {
  const float top = fmaxf(row.highest, sink), base = top == -kInfinity ? 0.f : top;  // -inf - -inf would be NaN
  const float weight = ptx::exp2(row.highest - base), total = row.total * weight + ptx::exp2(sink - base);
  return total == 0.f ? 0.f : weight / total;
}

// ---- operands of 8 bits --------------------------------------------------------------------------------------------

// Bytes `first` (0 or 1) and `first` + 2 of four elements C, times EightBit<C>::kUnit, as 16-bit elements T.
template <class T>
PTX_DEVICE uint32_t two_of(int8_t, uint32_t bytes, int first) {
  // With their sign bits flipped the bytes are x + 128; below the exponent of 2^23, the float 2^23 + 128 + x.
  const uint32_t biased = bytes ^ 0x80808080u;
  const float a = ptx::from_bits(ptx::permute_bytes(biased, 0x4b000000u, 0x7540u + first)) - 8388736.f;
  const float b = ptx::from_bits(ptx::permute_bytes(biased, 0x4b000000u, 0x7542u + first)) - 8388736.f;
  return pack2(T{}, a, b);
}
// The fields of exponent and fraction, put where T has them, make a number of T, subnormal ones included: times 2^-8 as
// f16, 2^-120 as bf16, where an exact product brings it up to 2^-8. NaN, which no cache holds that kv_cache_write has
// written, is not looked for: it is taken for 480.
template <class T>
PTX_DEVICE uint32_t two_of(f8, uint32_t bytes, int first) {
  const uint32_t x = first ? bytes : bytes << 8, signs = x & 0x80008000u;  // in the upper byte of each half
  if constexpr (std::is_same_v<T, f16>)
    return signs | (x >> 1 & 0x3f803f80u);
  else
    return ptx::multiply_bf16x2(signs | (x >> 4 & 0x07f007f0u), 0x77807780u);  // 2^112
}

// ldmatrix of rows of bytes gives lane (g, t) the columns 4t .. 4t+3 of 16, where a B fragment holds 2t, 2t+1, 2t+8,
// 2t+9. A dot product may take its terms in any order, so q is stored in that of two_of(): place i of 16 holds column
// key_column(i).
PTX_DEVICE int key_column(int i) { return i % 8 / 2 * 4 + i % 2 * 2 + i / 8; }

// ---- a warp --------------------------------------------------------------------------------------------------------

// One warp's state, and what it does with a tile.
template <class T, class C, int Index>
struct Warp {
  using L = Layout<C, Index>;
  static constexpr Tile kTile = L::kTile;
  static constexpr int kScoreTiles = L::kGroupKeys / 8, kColumnTiles = L::kColumns / 8;

  uint8_t* memory;
  int warp, lane, row_tile, key_group, column_group;
  int first_key[2], last_key[2];  // what rows lane / 4 and lane / 4 + 8 see
  float acc[kColumnTiles][4];
  float highest[2], total[2];  // total: over the lane's own columns

  // Whether the lane writes what all warps and lanes with the same rows know.
  __device__ bool leads() const { return key_group == 0 && column_group == 0 && lane % 4 == 0; }

  // s = q k^T of the warp's own keys
  __device__ void own_scores(const uint8_t* stage, float (&s)[L::kOwnKeys / 8][4]) {
    constexpr int kSteps = kEightBit<C> ? 4 : 2;  // products of 16 columns in 4 chunks of a row
    const uint32_t q = ptx::shared_address(memory), k = ptx::shared_address(stage);
    const int row = row_tile * 16 + lane % 16;
    const int key = key_group * L::kGroupKeys + column_group * L::kOwnKeys + lane % 8;
#pragma unroll
    for (int n = 0; n < L::kOwnKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
#pragma unroll 6  // all of 192 columns; a longer loop would only be registers for addresses
    for (int c = 0; c < L::K::kChunks / 4; ++c) {
      uint32_t a[kSteps][4];
#pragma unroll
      for (int j = 0; j < kSteps; ++j) ptx::ldmatrix_x4(a[j], q + L::Q::at(row, 2 * (kSteps * c + j) + lane / 16));
#pragma unroll
      for (int n = 0; n < L::kOwnKeys / 8; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, k + L::K::at(key + 8 * n, 4 * c + lane / 8));
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          if constexpr (kEightBit<C>) {
            ptx::mma(T{}, s[n], a[j], two_of<T>(C{}, b[j], 0), two_of<T>(C{}, b[j], 1));
          } else {
            ptx::mma(T{}, s[n], a[j], b[2 * j], b[2 * j + 1]);
          }
        }
      }
    }
  }

  // The scores of all keys of the group. Warps that differ in their columns of V alone have computed a part each, and
  // swap them as they are, fragment by fragment.
  __device__ void scores(const uint8_t* stage, float (&s)[kScoreTiles][4]) {
    if constexpr (kTile.column_groups == 1) {
      own_scores(stage, s);
    } else {
      constexpr int kOwn = L::kOwnKeys / 8;
      float own[kOwn][4];
      own_scores(stage, own);
      const auto place = [&](int of_warp, int n) {
        return reinterpret_cast<ptx::Vec16*>(memory + L::kExchange0 + of_warp * L::kExchange) + n * 32 + lane;
      };
#pragma unroll
      for (int n = 0; n < kOwn; ++n)
        *place(warp, n) = {ptx::bits(own[n][0]), ptx::bits(own[n][1]), ptx::bits(own[n][2]), ptx::bits(own[n][3])};
      // One barrier is enough: the next tile's scores come after a barrier of the CTA.
      ptx::barrier_sync(1 + warp / kTile.column_groups, 32 * kTile.column_groups);
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
        const ptx::Vec16 v = *place(warp - column_group + n / kOwn, n % kOwn);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = ptx::from_bits(v.x[i]);
      }
    }
  }

  // Scores -> exponents of 2 -> probabilities less the row's highest, which rescales what has been summed so far.
  __device__ void softmax(const AttentionMask& m, int tile_key, const KeyScales* scales, float (&s)[kScoreTiles][4]) {
    const int column = key_group * L::kGroupKeys + 2 * (lane % 4);  // the lane's first key, within the tile
    const float factor = m.scale * kLog2e;
    float top[2] = {highest[0], highest[1]};
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = column + 8 * n + i % 2, key = tile_key + at, row = i / 2;
        float x = s[n][i];
        if constexpr (kEightBit<C>) x *= scales[at].k;
        x = m.softcap > 0.f ? tanhf(x * (m.scale / m.softcap)) * (m.softcap * kLog2e) : x * factor;
        s[n][i] = key >= first_key[row] && key <= last_key[row] ? x : -kInfinity;
        top[row] = fmaxf(top[row], s[n][i]);
      }
    float base[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      top[row] = fmaxf(top[row], ptx::shfl_xor(top[row], 1));
      top[row] = fmaxf(top[row], ptx::shfl_xor(top[row], 2));
      base[row] = top[row] == -kInfinity ? 0.f : top[row];  // -inf - -inf would be NaN
    }
    if (ptx::ballot(top[0] > highest[0] || top[1] > highest[1])) {  // rare after the first tiles
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float rescale = ptx::exp2(highest[row] - base[row]);
        highest[row] = top[row];
        total[row] *= rescale;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) acc[n][2 * row] *= rescale, acc[n][2 * row + 1] *= rescale;
      }
    }
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = ptx::exp2(s[n][i] - base[i / 2]);
        total[i / 2] += s[n][i];
        if constexpr (kEightBit<C>) s[n][i] *= scales[column + 8 * n + i % 2].v;
      }
  }

  // acc += p v. The C fragments of two score tiles, rounded to 16 bits, are the A fragment of 16 keys.
  __device__ void add_values(const uint8_t* stage, const float (&s)[kScoreTiles][4]) {
    const uint32_t v = ptx::shared_address(stage) + L::kV;
    const int key = key_group * L::kGroupKeys + lane % 16;
    const int chunk = column_group * (L::kColumns / L::kElements) + lane / 16;
#pragma unroll
    for (int k = 0; k < kScoreTiles / 2; ++k) {
      const uint32_t a[4] = {pack2(T{}, s[2 * k][0], s[2 * k][1]), pack2(T{}, s[2 * k][2], s[2 * k][3]),
                             pack2(T{}, s[2 * k + 1][0], s[2 * k + 1][1]),
                             pack2(T{}, s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
      for (int c = 0; c < L::kColumns / L::kElements / 2; ++c) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, v + L::V::at(key + 16 * k, chunk + 2 * c));
        if constexpr (kEightBit<C>) {
          // Transposed as 16-bit units, a register holds columns 2g, 2g+1 of two keys: column tiles 2i and 2i+1 are the
          // even and the odd columns of 16.
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t low = b[2 * i], high = b[2 * i + 1];
            ptx::mma(T{}, acc[4 * c + 2 * i], a, two_of<T>(C{}, low, 0), two_of<T>(C{}, high, 0));
            ptx::mma(T{}, acc[4 * c + 2 * i + 1], a, two_of<T>(C{}, low, 1), two_of<T>(C{}, high, 1));
          }
        } else {
          ptx::mma(T{}, acc[2 * c], a, b[0], b[1]);
          ptx::mma(T{}, acc[2 * c + 1], a, b[2], b[3]);
        }
      }
    }
  }

  __device__ ptx::Vec16* merge_place(int of_warp, int n) const {
    return reinterpret_cast<ptx::Vec16*>(memory + L::kStage0 + of_warp * L::kAccumulator) + n * 32 + lane;
  }

  // Joins the key groups: highest and total become those of all keys, and the accumulators, which go to shared memory,
  // count with these weights.
  __device__ void join(float (&weight)[L::kKeyGroups][2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      total[row] += ptx::shfl_xor(total[row], 1);
      total[row] += ptx::shfl_xor(total[row], 2);
    }
    if constexpr (L::kKeyGroups > 1) {
      auto* stats = reinterpret_cast<RowStats*>(memory + L::kStats0);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
        *merge_place(warp, n) = {ptx::bits(acc[n][0]), ptx::bits(acc[n][1]), ptx::bits(acc[n][2]),
                                 ptx::bits(acc[n][3])};
      if (lane % 4 == 0)
#pragma unroll
        for (int row = 0; row < 2; ++row) stats[warp * 16 + lane / 4 + 8 * row] = {highest[row], total[row]};
      ptx::syncthreads();
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        RowStats of[L::kKeyGroups];
#pragma unroll
        for (int g = 0; g < L::kKeyGroups; ++g) {
          of[g] = stats[(g * kTile.column_groups + column_group) * 16 + lane / 4 + 8 * row];
          highest[row] = fmaxf(highest[row], of[g].highest);
        }
        const float base = highest[row] == -kInfinity ? 0.f : highest[row];
        total[row] = 0.f;
#pragma unroll
        for (int g = 0; g < L::kKeyGroups; ++g) {
          weight[g][row] = ptx::exp2(of[g].highest - base);
          total[row] += of[g].total * weight[g][row];
        }
      }
    }
  }

  // f(row, column, Pair) for the warp's share of what has been joined.
  struct alignas(8) Pair {
    float low, high;
  };
  template <class F>
  __device__ void for_pairs(const float (&weight)[L::kKeyGroups][2], const F& f) const {
    const auto columns = [&](int c, const float(&x)[2][4]) {  // 16 of them: column tiles 2c and 2c + 1
      const int column = column_group * L::kColumns + 16 * c + (kEightBit<C> ? 4 : 2) * (lane % 4);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float a = x[0][2 * row], b = x[0][2 * row + 1], d = x[1][2 * row], e = x[1][2 * row + 1];
        // of 8 bits: a, b are even columns, d, e odd ones
        f(row, column, kEightBit<C> ? Pair{a, d} : Pair{a, b});
        f(row, column + (kEightBit<C> ? 2 : 8), kEightBit<C> ? Pair{b, e} : Pair{d, e});
      }
    };
    if constexpr (L::kKeyGroups == 1) {
#pragma unroll
      for (int c = 0; c < kColumnTiles / 2; ++c) {
        const float x[2][4] = {{acc[2 * c][0], acc[2 * c][1], acc[2 * c][2], acc[2 * c][3]},
                               {acc[2 * c + 1][0], acc[2 * c + 1][1], acc[2 * c + 1][2], acc[2 * c + 1][3]}};
        columns(c, x);
      }
    } else {
      for (int c = key_group; c < kColumnTiles / 2; c += L::kKeyGroups) {
        float x[2][4] = {};
#pragma unroll
        for (int g = 0; g < L::kKeyGroups; ++g)
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const ptx::Vec16 v = *merge_place(g * kTile.column_groups + column_group, 2 * c + n);
#pragma unroll
            for (int i = 0; i < 4; ++i) x[n][i] += ptx::from_bits(v.x[i]) * weight[g][i / 2];
          }
        columns(c, x);
      }
    }
  }

  static constexpr float kUndo = 1 / (EightBit<C>::kRange * EightBit<C>::kUnit);

  // Writes the CTA's partial sums. `place`: of the lane's rows in plan.stats, or -1.
  __device__ void finish_sums(const Plan& plan, const int64_t (&place)[2]) {
    float weight[L::kKeyGroups][2];
    join(weight);
    for_pairs(weight, [&](int row, int column, const Pair& x) {
      if (place[row] >= 0 && column < plan.width)
        *reinterpret_cast<Pair*>(plan.sums + place[row] * plan.width + column) = {x.low * kUndo, x.high * kUndo};
    });
    if (leads())
#pragma unroll
      for (int row = 0; row < 2; ++row)
        if (place[row] >= 0) plan.stats[place[row]] = {highest[row], total[row]};
  }

  // Leaves the output in shared memory, at L::output_at.
  __device__ void finish_output(const float (&sink)[2]) {
    float weight[L::kKeyGroups][2];
    join(weight);
    float factor[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) factor[row] = output_factor({highest[row], total[row]}, sink[row]) * kUndo;
    for_pairs(weight, [&](int row, int column, const Pair& x) {
      const uint32_t at = L::output_at(row_tile * 16 + lane / 4 + 8 * row, column);
      *reinterpret_cast<uint32_t*>(memory + at) = pack2(T{}, x.low * factor[row], x.high * factor[row]);
    });
  }
};

}  // namespace decode
}  // namespace cuda
}  // namespace llmcore
