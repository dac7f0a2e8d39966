// What the kernels of attention's backward pass are built from: where a tile's rows lie, who sees whom, tiles in shared
// memory, and the matrix products on them.
#pragma once
#include "attention_base.cuh"
#include "launch.cuh"

namespace llmcore {
namespace cuda {

// ---- sequences -----------------------------------------------------------------------------------------------------

// Lengths may be on the device only (cu_seqlens), so a grid cannot know how many tiles of n rows a batch has. Slots
// bound them: sequence b owns the slots from start(b) / n + b on, where start(b) counts the rows before it. These are
// at least as many as its tiles, and rows / n + batch in all; a slot beyond its sequence's last tile has no work.
struct Slots {
  const int32_t* cu;  // the offsets of packed sequences; or null, and all have this
  int64_t length;
  int tile;  // rows

  __device__ int64_t first(int64_t b) const { return (cu ? cu[b] : b * length) / tile + b; }
  __device__ int64_t sequence_of(int64_t slot, int64_t batch) const {
    int64_t low = 0, high = batch;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first(middle) <= slot ? low : high) = middle;
    }
    return low;
  }
};
__host__ __device__ inline int64_t count_slots(int64_t rows, int64_t batch, int tile) {
  return batch ? rows / tile + batch : 0;
}

// ---- who sees whom -------------------------------------------------------------------------------------------------

enum class View { none, some, all };  // what the queries of a tile see of its keys
// Query i stands at key i + offset and sees the keys of its band, of those the ones in the blocks that its head's block
// mask admits.
struct Visibility {
  int num_q, num_k, offset;
  Band band;
  const uint8_t* blocks;  // of the sequence, or null
  int64_t blocks_head, blocks_row;
  int block_q, block_k;

  __device__ KeyRange keys_of(int first, int last) const {
    return {visible_keys(band, num_k, first + offset).first, visible_keys(band, num_k, last + offset).last};
  }
  __device__ Range queries_of(int first, int last) const {
    const int64_t from = static_cast<int64_t>(first) - band.above - offset,
                  to = static_cast<int64_t>(last) + band.below - offset;
    return {static_cast<int>(from > 0 ? from : 0), static_cast<int>(to < num_q - 1 ? to : num_q - 1)};
  }
  __device__ const uint8_t* block(int64_t head, int query, int key) const {
    return blocks + head * blocks_head + query / block_q * blocks_row + key / block_k;
  }
  __device__ bool sees(int64_t head, int query, int key) const {
    const int position = query + offset;
    return query < num_q && key < num_k && key >= position - band.below && key <= position + band.above &&
           (!blocks || *block(head, query, key));
  }
  // All lanes of a warp ask together, for the same tile; its first query and its first key exist.
  __device__ View of_tile(int64_t head, int q0, int queries, int k0, int keys) const {
    const int q1 = smaller(q0 + queries, num_q) - 1, k1 = smaller(k0 + keys, num_k) - 1;
    if (k1 < q0 + offset - band.below || k0 > q1 + offset + band.above) return View::none;
    const bool whole = q1 == q0 + queries - 1 && k1 == k0 + keys - 1 && k0 >= q1 + offset - band.below &&
                       k1 <= q0 + offset + band.above;
    if (!blocks) return whole ? View::all : View::some;
    const int rows = q1 / block_q - q0 / block_q + 1, columns = k1 / block_k - k0 / block_k + 1;
    const uint8_t* corner = block(head, q0, k0);
    bool any = false, all = whole;
    for (int i = static_cast<int>(threadIdx.x % 32); i < rows * columns; i += 32) {
      const bool seen = corner[i / columns * blocks_row + i % columns];
      any |= seen;
      all &= seen;
    }
    const bool none = ptx::ballot(any) == 0;
    all = ptx::ballot(all) == ptx::kFullMask;
    return none ? View::none : all ? View::all : View::some;
  }
};

PTX_DEVICE Visibility visibility(const AttentionMask& m, const Sequence& seq, int64_t b) {
  Visibility v{seq.num_q, seq.num_k, position_of(seq, 0), band_of(m), nullptr, 0, 0, 1, 1};
  if (m.block_mask) {
    v.blocks = m.block_mask + b * m.mask_batch;
    v.blocks_head = m.mask_head;
    v.blocks_row = m.mask_row;
    v.block_q = static_cast<int>(smaller<int64_t>(m.block_q, kNoEnd));
    v.block_k = static_cast<int>(smaller<int64_t>(m.block_k, kNoEnd));
  }
  return v;
}

// ---- tiles in shared memory ----------------------------------------------------------------------------------------

// `count` rows of `dim` elements each, of one head of one sequence.
template <class T>
struct Rows {
  T* at;
  int64_t stride;
  int count, dim;
};
template <class T>
PTX_DEVICE Rows<T> rows_of(const void* base, const RowStrides& s, int64_t b, int64_t start, int64_t head, int count,
                           int64_t dim) {
  // Whoever asks for const rows reads them only.
  T* at = static_cast<T*>(const_cast<void*>(base)) + b * s.batch + start * s.row + head * s.head;
  return {at, s.row, count, static_cast<int>(dim)};
}

// A tile of rows of kDim 16-bit elements, in chunks of 16 bytes. ldmatrix reads one chunk of 8 consecutive rows at a
// time, and these must lie in different banks: chunks of a row are exchanged by an XOR with the row's number, of as
// many bits as rows of this length leave to be spread.
template <int kDim>
struct SharedTile {
  static_assert(kDim % 16 == 0);
  static constexpr int kChunks = kDim / 8;
  static constexpr int kShift = kChunks % 8 == 0 ? 0 : kChunks % 4 == 0 ? 1 : 2, kBits = 7 >> kShift;
  static __host__ __device__ constexpr int bytes(int rows) { return rows * kDim * 2; }
  static __device__ uint32_t at(int row, int chunk) {
    return static_cast<uint32_t>(row * kDim * 2 + ((chunk ^ (row >> kShift & kBits)) << 4));
  }
};

// Brings rows [row0, row0 + kRows), elements [column0, column0 + kDim), into a tile, with zeros for what does not
// exist. Rows that are aligned to 16 bytes are copied asynchronously, into the group that the caller commits; others
// element by element.
template <class T, int kRows, int kDim, int kThreads>
PTX_DEVICE void stage(uint8_t* tile, const Rows<const T>& from, int row0, int column0) {
  constexpr int kChunks = SharedTile<kDim>::kChunks;
  const bool aligned = (reinterpret_cast<uintptr_t>(from.at) | static_cast<uintptr_t>(from.stride * 2)) % 16 == 0;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int row = row0 + i / kChunks, column = column0 + i % kChunks * 8;
    const int elements = row < from.count ? smaller(larger(from.dim - column, 0), 8) : 0;
    const T* source = from.at + (elements ? row * from.stride + column : 0);
    uint8_t* to = tile + SharedTile<kDim>::at(i / kChunks, i % kChunks);
    if (aligned) {
      ptx::copy_async_16(ptx::shared_address(to), source, elements * 2);
    } else {
      ptx::Vec16 v{};
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < elements) v.x[e / 2] |= static_cast<uint32_t>(source[e].bits) << 16 * (e % 2);
      *reinterpret_cast<ptx::Vec16*>(to) = v;
    }
  }
}

// ---- matrix products (fragments: ptx.cuh) --------------------------------------------------------------------------

template <int kBlocks, int kColumns>
struct Accumulator {  // of kBlocks * 16 rows
  float c[kBlocks][kColumns / 8][4];
};

template <int kBlocks, int kColumns>
PTX_DEVICE void clear(Accumulator<kBlocks, kColumns>& x) {
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x.c[m][n][i] = 0.f;
}

// s += X Y^T for kBlocks * 16 rows of X from x_row on and kColumns rows of Y from y_row on. Both tiles hold the summed
// dimension along their rows, which is what the A and the B fragment want.
template <class T, int kDim, int kUnroll = 2, int kBlocks, int kColumns>
PTX_DEVICE void multiply_rows(Accumulator<kBlocks, kColumns>& s, uint32_t x, int x_row, uint32_t y, int y_row) {
  using Tile = SharedTile<kDim>;
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll(kUnroll)  // all of them: ptxas loads so far ahead that registers spill
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[kBlocks][4];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
      ptx::ldmatrix_x4(a[m], x + Tile::at(x_row + m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, y + Tile::at(y_row + n * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        ptx::mma(T{}, s.c[m][2 * n], a[m], b[0], b[1]);
        ptx::mma(T{}, s.c[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc += A Y for 16 rows of Y from y_row on, its columns from 8 * chunk on: the summed dimension runs down Y's rows, so
// its fragments are read transposed. kColumns columns of acc, from `first` on (a constant, once loops are unrolled).
template <class T, int kDim, int kColumns, int kBlocks, int kWidth>
PTX_DEVICE void multiply_columns(Accumulator<kBlocks, kWidth>& acc, int first, const uint32_t (&a)[kBlocks][4],
                                 uint32_t y, int y_row, int chunk) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int n = 0; n < kColumns / 16; ++n) {
    uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, y + SharedTile<kDim>::at(y_row + lane % 16, chunk + n * 2 + lane / 16));
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      ptx::mma(T{}, acc.c[m][first / 8 + 2 * n], a[m], b[0], b[1]);
      ptx::mma(T{}, acc.c[m][first / 8 + 2 * n + 1], a[m], b[2], b[3]);
    }
  }
}

// Writes factor * acc to rows from row0 and columns from column0 on.
template <class T, int kBlocks, int kWidth>
PTX_DEVICE void write(const Accumulator<kBlocks, kWidth>& acc, const Rows<T>& to, int row0, int column0, float factor) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const bool pairs = (reinterpret_cast<uintptr_t>(to.at) | static_cast<uintptr_t>(to.stride * 2)) % 4 == 0;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + m * 16 + half * 8 + lane / 4;
      if (row >= to.count) continue;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        const int column = column0 + n * 8 + lane % 4 * 2;
        T* at = to.at + row * to.stride + column;
        const float low = acc.c[m][n][2 * half] * factor, high = acc.c[m][n][2 * half + 1] * factor;
        if (pairs && column + 1 < to.dim) {
          *reinterpret_cast<uint32_t*>(at) = pack2(T{}, low, high);
        } else {
          if (column < to.dim) at[0] = from_float<T>(low);
          if (column + 1 < to.dim) at[1] = from_float<T>(high);
        }
      }
    }
}

}  // namespace cuda
}  // namespace llmcore
