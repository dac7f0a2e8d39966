// What the forward and the decode kernel share: which rows a CTA takes, which keys they see, and the way of rows into
// shared memory.
//
// A task is a block of rows of one sequence and KV head. Its rows are ordered query-major: row r is query r / group,
// query head kv_head * group + r % group. So all query heads that share a KV head share its tiles of keys, and a few
// queries of many heads fill a tile.
#pragma once
#include "attention_base.cuh"

namespace llmcore {
namespace cuda {

// ---- tasks ---------------------------------------------------------------------------------------------------------

struct Task {
  int b, kv_head, group;
  int first_row, num_rows;  // num_rows: of the whole sequence, num_q * group
  Sequence seq;
};

// How many tasks of `rows` rows there may be for each KV head. Packed sequences are known to the device only: each can
// waste less than one task.
inline int64_t task_bound(const AttentionShape& s, int64_t rows) {
  const int64_t group = s.heads / s.kv_heads;
  return s.cu_q ? s.total_q * group / rows + s.batch : s.batch * ceil_div(s.seq_q * group, rows);
}

// Where block number `place` of packed queries lies, when each sequence has as many blocks of `rows` rows as it takes:
// in sequence b, from first_row on; false beyond the last. All lanes of a warp must ask together.
PTX_DEVICE bool find_packed(const AttentionShape& s, int group, int rows, uint32_t place, int& b, int& first_row) {
  // Each lane counts the blocks of one sequence; a running sum over the lanes says whose range holds `place`.
  const uint32_t lane = threadIdx.x % 32, batch = static_cast<uint32_t>(s.batch);
  for (uint32_t first = 0; first < batch; first += 32) {
    const uint32_t at = first + lane;
    const uint32_t own = at < batch ? ceil_div((s.cu_q[at + 1] - s.cu_q[at]) * group, rows) : 0;
    uint32_t sum = own;
#pragma unroll
    for (uint32_t d = 1; d < 32; d *= 2) {
      const uint32_t below = ptx::shfl(sum, (lane - d) % 32);
      if (lane >= d) sum += below;
    }
    const uint32_t all = ptx::shfl(sum, 31);
    if (place < all) {
      const uint32_t beyond = ptx::ballot(place < sum);
      int holder = 0;
      while (!(beyond >> holder & 1)) ++holder;
      b = static_cast<int>(first) + holder;
      first_row = static_cast<int>(place - ptx::shfl(sum - own, holder)) * rows;
      return true;
    }
    place -= all;
  }
  return false;
}

// Task number `index` of num_tasks = task_bound() * kv_heads; false when there are fewer. All lanes of a warp must ask
// together. The last rows come first: under a causal mask they see the most keys, and a grid ends best on small tasks.
PTX_DEVICE bool find_task(const AttentionShape& s, int rows, uint32_t index, uint32_t num_tasks, Task& t) {
  const uint32_t kv_heads = static_cast<uint32_t>(s.kv_heads), batch = static_cast<uint32_t>(s.batch);
  t.kv_head = static_cast<int>(index % kv_heads);
  t.group = static_cast<int>(s.heads) / static_cast<int>(s.kv_heads);
  const uint32_t place = num_tasks / kv_heads - 1 - index / kv_heads;  // among the tasks of this head
  if (!s.cu_q) {
    t.b = static_cast<int>(place % batch);
    t.first_row = static_cast<int>(place / batch) * rows;
  } else if (!find_packed(s, t.group, rows, place, t.b, t.first_row)) {
    return false;
  }
  t.seq = sequence(s, t.b);
  t.num_rows = t.seq.num_q * t.group;
  return true;
}

// ---- masks ---------------------------------------------------------------------------------------------------------

// What the rows [first, last] of a task see by position: some of them a key of `any`, each of them all keys of `all`.
struct RowsView {
  KeyRange any, all;
};
PTX_DEVICE RowsView view_rows(const Band& band, const Task& t, int first, int last) {
  if (first >= t.num_rows) return {{0, -1}, {0, -1}};  // no rows at all
  const KeyRange a = visible_keys(band, t.seq.num_k, position_of(t.seq, first / t.group));
  const KeyRange z = visible_keys(band, t.seq.num_k, position_of(t.seq, smaller(last, t.num_rows - 1) / t.group));
  return {{a.first, z.last}, {z.first, a.last}};
}

PTX_DEVICE const uint8_t* mask_row(const AttentionMask& m, int b, int head, int query) {
  return m.block_mask + b * m.mask_batch + head * m.mask_head + query / static_cast<int>(m.block_q) * m.mask_row;
}

// Whether the block mask lets any of the task's rows [first, last] see any of the keys.
PTX_DEVICE bool block_mask_sees(const AttentionMask& m, const Task& t, int first, int last, KeyRange keys) {
  const int block_q = static_cast<int>(m.block_q), block_k = static_cast<int>(m.block_k);
  const int q_begin = first / t.group / block_q, q_end = smaller(last, t.num_rows - 1) / t.group / block_q;
  for (int head = 0; head < (m.mask_head ? t.group : 1); ++head)
    for (int q = q_begin; q <= q_end; ++q) {
      const uint8_t* seen = mask_row(m, t.b, t.kv_head * t.group + head, q * block_q);
      for (int k = keys.first / block_k; k <= keys.last / block_k; ++k)
        if (seen[k]) return true;
    }
  return false;
}

// Goes over the tiles of kKeys keys that some row of a task sees, in rising order; `keys` are those seen by position.
constexpr int kNoTile = 0x7fffffff;
template <int kKeys>
struct KeyTiles {
  int at;          // the tile at hand; kNoTile behind the last one
  int base;        // With a block mask: of the 32 tiles from here on,
  uint32_t ahead;  // those that are seen and still to come (bit i: base + i).

  __device__ __forceinline__ void start(const KeyRange& keys) {  // before the first
    at = keys.last < keys.first ? kNoTile : keys.first / kKeys - 1;
    base = at - 31;
    ahead = 0;
  }
  // All lanes of a warp must ask together.
  __device__ __forceinline__ void advance(const AttentionMask& m, const Task& t, int last_row, const KeyRange& keys) {
    if (at == kNoTile) return;
    if (!m.block_mask) {
      at = (at + 1) * kKeys <= keys.last ? at + 1 : kNoTile;
      return;
    }
    while (!ahead) {
      base += 32;
      if (base * kKeys > keys.last) {
        at = kNoTile;
        return;
      }
      const int first_key = (base + static_cast<int>(threadIdx.x % 32)) * kKeys;
      const KeyRange part{larger(first_key, keys.first), smaller(first_key + kKeys - 1, keys.last)};
      ahead = ptx::ballot(part.first <= part.last && block_mask_sees(m, t, t.first_row, last_row, part));
    }
    int i = 0;
    while (!(ahead >> i & 1)) ++i;
    ahead &= ahead - 1;
    at = base + i;
  }
};

// Scores of one row of a C fragment, at s[j][2 half] and s[j][2 half + 1] those of the keys `key` + 8 j and one more:
// -inf where the row does not see the key. `key` is the lane's first: the tile's first + 2 (lane % 4).
template <int kTiles>
PTX_DEVICE void mask_by_position(const KeyRange& seen, int key, int half, float (&s)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (key + 8 * j + e < seen.first || key + 8 * j + e > seen.last) s[j][2 * half + e] = kNegInf;
}
// The same by the block mask. Rows beyond the task's last are computed, but not stored.
template <int kTiles>
PTX_DEVICE void mask_by_blocks(const AttentionMask& m, const Task& t, int row, int key, int half,
                               float (&s)[kTiles][4]) {
  row = smaller(row, t.num_rows - 1);
  const uint8_t* blocks = mask_row(m, t.b, t.kv_head * t.group + row % t.group, row / t.group);
  const int block_k = static_cast<int>(m.block_k);
  uint32_t seen = 0;  // bit i: the i-th of the lane's keys. A loop that is not unrolled needs few registers.
  int block_end = 0;
  bool now = false;
#pragma unroll 1
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int at = key + i / 2 * 8 + i % 2;
    if (at >= t.seq.num_k) break;
    if (at >= block_end) {  // a new block
      const int block = at / block_k;
      block_end = (block + 1) * block_k;
      now = blocks[block];
    }
    seen |= static_cast<uint32_t>(now) << i;
  }
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i)
    if (!(seen >> i & 1)) s[i / 2][2 * half + i % 2] = kNegInf;
}

// Scores become exponents of 2: score * exponent_factor, the product formed where it is used, in one fma with the
// subtraction of the maximum. With a soft cap, or a scale that would turn -inf around, ready_scores() replaces the
// scores by exponents beforehand and the factor is 1.
PTX_DEVICE bool ready_first(const AttentionMask& m) { return m.softcap > 0 || m.scale <= 0; }
PTX_DEVICE float exponent_factor(const AttentionMask& m) { return ready_first(m) ? 1.f : m.scale * kLog2e; }
template <int kFragments, int kTiles>
PTX_DEVICE void ready_scores(const AttentionMask& m, float (&s)[kFragments][kTiles][4]) {
  const float in = m.softcap > 0 ? m.scale / m.softcap : 0.f, out = m.softcap * kLog2e, factor = m.scale * kLog2e;
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float(&x)[4] = s[f][j];
      // tanhf: the approximate instruction's error times the cap would exceed the rounding of a probability
      if (m.softcap > 0)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = tanhf(x[e] * in) * out;
      else
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] *= factor;
    }
}

// ---- staging -------------------------------------------------------------------------------------------------------

// Eight elements as T, those from `count` on zero.
template <class T, class From>
PTX_DEVICE ptx::Vec16 converted(const From* from, int count, float factor) {
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < count ? to_float(from[i]) * factor : 0.f;
  ptx::Vec16 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.x[i] = pack2(T{}, x[2 * i], x[2 * i + 1]);
  return v;
}
template <class T>
PTX_DEVICE ptx::Vec16 converted(DType dtype, const void* from, int64_t element, int count, float factor) {
  switch (dtype) {
    case DType::f32: return converted<T>(static_cast<const float*>(from) + element, count, factor);
    case DType::bf16: return converted<T>(static_cast<const bf16*>(from) + element, count, factor);
    case DType::f16: return converted<T>(static_cast<const f16*>(from) + element, count, factor);
    case DType::f8: return converted<T>(static_cast<const f8*>(from) + element, count, factor);
    default: return converted<T>(static_cast<const int8_t*>(from) + element, count, factor);
  }
}

// How the rows of a tensor reach shared memory.
struct RowFormat {
  const void* base;
  DType dtype;
  bool copies;  // elements of type T in rows aligned to 16 bytes: asynchronous copies; else converted one by one
};
struct RowPlace {
  int64_t offset;  // in elements
  float factor;    // of its elements, when they are converted
};

// Brings columns [first_column, first_column + kColumns) of kRows rows to shared + to; zeros from row `rows` and from
// column `dim` on. place(i) tells where row i lies and is asked for rows < `rows` only. The caller commits the copies.
template <class T, int kRows, int kColumns, int kThreads, class Place>
PTX_DEVICE void stage_rows(uint8_t* shared, uint32_t to, int pitch, const RowFormat& format, int rows, int first_column,
                           int dim, const Place& place) {
  // Eight lanes take 128 bytes of a row, so that a warp's rows are read in whole lines. From one pass over the rows to
  // the next the swizzle is the same, and addresses differ by constants.
  constexpr int kRowsAtOnce = kThreads / 8;
  static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0, "whole passes");
  const int first_row = static_cast<int>(threadIdx.x) / 8, chunk = static_cast<int>(threadIdx.x) % 8;
  const uint32_t first = to + chunk_offset(pitch, first_row, chunk);
  const auto columns_at = [&](int row, int column) { return row < rows ? smaller(larger(dim - column, 0), 8) : 0; };
  if (format.copies) {
    const uint32_t address = ptx::shared_address(shared) + first;
#pragma unroll
    for (int pass = 0; pass < kRows / kRowsAtOnce; ++pass) {
      const int row = first_row + pass * kRowsAtOnce;
      const T* from = static_cast<const T*>(format.base);
      if (row < rows) from += place(row).offset;
#pragma unroll
      for (int panel = 0; panel < kColumns; panel += 64) {
        if (panel + 8 * chunk >= kColumns) continue;
        const int column = first_column + panel + 8 * chunk, count = columns_at(row, column);
        ptx::copy_async_16(address + pass * kRowsAtOnce * pitch + 2 * panel, count ? from + column : from, 2 * count);
      }
    }
    return;
  }
#pragma unroll 1
  for (int row = first_row; row < kRows; row += kRowsAtOnce) {
    RowPlace from{0, 0.f};
    if (row < rows) from = place(row);
#pragma unroll 1
    for (int panel = 0; panel + 8 * chunk < kColumns; panel += 64) {
      const int column = first_column + panel + 8 * chunk, count = columns_at(row, column);
      *reinterpret_cast<ptx::Vec16*>(shared + first + (row - first_row) * pitch + 2 * panel) =
          converted<T>(format.dtype, format.base, from.offset + (count ? column : 0), count, from.factor);
    }
  }
}

}  // namespace cuda
}  // namespace llmcore
