// The tile of a grouped GEMM: its sizes, the way of its operands into shared memory, its product on tensor cores, and
// the way of the result out.
//
// Operands stand in shared memory with rows of the matrix as rows (a step of kStep elements of the sum across), or
// transposed: with steps of the sum as rows. ldmatrix reads fragments from either.
#pragma once
#include "launch.cuh"
#include "tile.cuh"

namespace llmcore {
namespace cuda {

constexpr int kStep = 64;  // of the sum, between two barriers: rows of 128 bytes, which the swizzle permutes

struct GemmTile {
  int m, n;              // of the product
  int warps_m, warps_n;  // each warp owns an equal part
  int stages;            // slots of the ring that the operands go through
  int ctas;              // on a multiprocessor at a time

  __host__ __device__ constexpr int threads() const { return 32 * warps_m * warps_n; }
  __host__ __device__ constexpr int warp_m() const { return m / warps_m; }
  __host__ __device__ constexpr int warp_n() const { return n / warps_n; }
  __host__ __device__ constexpr int a_bytes() const { return 2 * kStep * m; }
  __host__ __device__ constexpr int slot_bytes() const { return 2 * kStep * (m + n); }
  __host__ __device__ constexpr int shared_bytes() const { return stages * slot_bytes(); }
};

enum GemmTileIndex { kWide, kNarrow, kFew };
constexpr GemmTile kGemmTiles[] = {
    // Warps of 64 x 64: one ldmatrix for four products, half of what shared memory can feed
    // (cuda-attention-backward.md,
    // "What bounds it"). 128 registers of sums; 144 of the 163 KiB that sm_80 has.
    {128, 256, 2, 4, 3, 1},
    // For few columns, small grids and cards with 99 KiB: warps of 64 x 32, 96 KiB, of which an sm_90 has room for two.
    {128, 128, 2, 4, 3, 2},
    // Few rows for each expert: the weights are the side of 128, so that no product is wasted on absent rows beyond 16
    // and each weight goes through the machine once. 72 KiB, of which 48 are on their way: two CTAs on an sm_80, three
    // on an sm_90 keep the memory busy.
    {128, 16, 4, 1, 4, 2},
};

// ---- which tile ----------------------------------------------------------------------------------------------------

// A block of `rows` rows of one expert, and a block of columns.
struct ExpertTile {
  int expert, first_row, rows, column_block;
};

constexpr int kRowTilesAtOnce = 16;  // see below

// How many tiles there may be: how many rows an expert has is known to the device only, and each expert that has some
// can waste less than one tile.
inline int64_t tile_bound(int64_t rows, int64_t num_experts, int tile_rows, int64_t column_blocks) {
  return (rows / tile_rows + smaller(rows, num_experts)) * column_blocks;
}

// Tile number `index`; false when there are fewer. All lanes of a warp must ask together. Every warp looks for itself,
// by one pass over the offsets: all loads of a lane are on their way at once, and neither a kernel before this one nor
// a barrier is needed.
//
// Experts follow one another. Within an expert, tiles go down kRowTilesAtOnce blocks of rows before they turn to the
// next block of columns: those in flight at a time share their weights, and the rows stay in L2 until the last column.
PTX_DEVICE bool find_tile(const int32_t* offsets, int num_experts, int tile_rows, int column_blocks, uint32_t index,
                          ExpertTile& t) {
  const int lane = threadIdx.x % 32, each = ceil_div(num_experts, 32);
  const int first = smaller(lane * each, num_experts), last = smaller(first + each, num_experts);
  const uint32_t blocks = static_cast<uint32_t>(column_blocks);
  uint32_t own = 0;
  for (int e = first; e < last; ++e)
    own += static_cast<uint32_t>(ceil_div(offsets[e + 1] - offsets[e], tile_rows)) * blocks;
  uint32_t sum = own;  // over the lanes up to this one
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t below = ptx::shfl(sum, (lane - d) & 31);
    if (lane >= d) sum += below;
  }
  const uint32_t beyond = ptx::ballot(index < sum);
  if (!beyond) return false;
  int holder = 0;
  while (!(beyond >> holder & 1)) ++holder;

  int expert = first;
  uint32_t place = index - (sum - own);
  if (lane == holder)
    for (;; ++expert) {
      const uint32_t tiles = static_cast<uint32_t>(ceil_div(offsets[expert + 1] - offsets[expert], tile_rows)) * blocks;
      if (place < tiles) break;
      place -= tiles;
    }
  t.expert = static_cast<int>(ptx::shfl(static_cast<uint32_t>(expert), holder));
  place = ptx::shfl(place, holder);

  const int begin = offsets[t.expert], end = offsets[t.expert + 1];
  const uint32_t row_tiles = static_cast<uint32_t>(ceil_div(end - begin, tile_rows));
  const uint32_t group = place / (kRowTilesAtOnce * blocks), rest = place - group * kRowTilesAtOnce * blocks;
  const uint32_t in_group = smaller<uint32_t>(row_tiles - group * kRowTilesAtOnce, kRowTilesAtOnce);
  t.column_block = static_cast<int>(rest / in_group);
  t.first_row = begin + static_cast<int>(group * kRowTilesAtOnce + rest % in_group) * tile_rows;
  t.rows = smaller(end - t.first_row, tile_rows);
  return true;
}

// ---- operands into shared memory -----------------------------------------------------------------------------------

// Eight adjacent elements of a row, of which `count` are there; the others become zeros, and none of them is read.
template <class T>
struct Chunk {
  const T* from;
  int count;
};
template <class T>
PTX_DEVICE Chunk<T> chunk_of(const T* from, int left, bool there) {
  return {from, there ? smaller(larger(left, 0), 8) : 0};
}

// Eight threads take 128 bytes of a row, a "panel"; from one pass over the rows to the next the swizzle is the same.
template <int kThreads>
constexpr int kRowsAtOnce = kThreads / 8;
PTX_DEVICE int thread_row() { return static_cast<int>(threadIdx.x) / 8; }
PTX_DEVICE int thread_column() { return static_cast<int>(threadIdx.x) % 8 * 8; }

// Brings a tile of kRows x kColumns elements to shared + to. source(pass, panel) gives the chunk at row thread_row() +
// pass * kRowsAtOnce and column thread_column() + 64 * panel. With `copies` all chunks are aligned to 16 bytes; the
// caller commits.
template <class T, int kRows, int kColumns, int kThreads, class Source>
PTX_DEVICE void stage_tile(uint8_t* shared, uint32_t to, bool copies, const Source& source) {
  constexpr int kPitch = 2 * kColumns, kPassBytes = kRowsAtOnce<kThreads> * kPitch;
  constexpr int kPasses = kRows / kRowsAtOnce<kThreads>;
  static_assert(kRows % kRowsAtOnce<kThreads> == 0 && kRowsAtOnce<kThreads> % 8 == 0 && kColumns % 64 == 0);
  const uint32_t first = to + chunk_offset(kPitch, thread_row(), thread_column() / 8);
  if (copies) {
    const uint32_t address = ptx::shared_address(shared) + first;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass)
#pragma unroll
      for (int panel = 0; panel < kColumns / 64; ++panel) {
        const Chunk<T> c = source(pass, panel);
        ptx::copy_async_16(address + pass * kPassBytes + 128 * panel, c.from, 2 * c.count);
      }
    return;
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass)
#pragma unroll 1
    for (int panel = 0; panel < kColumns / 64; ++panel) {
      const Chunk<T> c = source(pass, panel);
      ptx::Vec16 v{};
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < c.count) v.x[i / 2] |= static_cast<uint32_t>(c.from[i].bits) << 16 * (i % 2);
      *reinterpret_cast<ptx::Vec16*>(shared + first + pass * kPassBytes + 128 * panel) = v;
    }
}

// The rows of x that a thread stages, of a tile of kRows sorted rows.
template <class T, int kRows, int kThreads>
struct SourceRows {
  static constexpr int kPasses = kRows / kRowsAtOnce<kThreads>;
  const T* row[kPasses];  // from thread_column() on
  uint32_t there;         // bit i: row i is

  // The tile begins with sorted row `first`, of which and what follows `rows` are the expert's.
  __device__ __forceinline__ void find(const void* x, int64_t stride, const int32_t* token_of, int first, int rows) {
    there = 0;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int r = thread_row() + pass * kRowsAtOnce<kThreads>;
      int64_t from = 0;
      if (r < rows) {
        from = token_of ? token_of[first + r] : first + r;
        there |= 1u << pass;
      }
      row[pass] = static_cast<const T*>(x) + from * stride + thread_column();
    }
  }
  // The chunk `column` elements further on, of rows that have `columns`.
  __device__ __forceinline__ Chunk<T> chunk(int pass, int column, int columns) const {
    return chunk_of(row[pass] + column, columns - column - thread_column(), there >> pass & 1);
  }
};

// ---- the product ---------------------------------------------------------------------------------------------------

template <int kIndex>
using Sums = float[kGemmTiles[kIndex].warp_m() / 16][kGemmTiles[kIndex].warp_n() / 8][4];

// The part of the product that a warp owns.
template <int kIndex>
PTX_DEVICE int warp_row() {
  return static_cast<int>(threadIdx.x) / 32 / kGemmTiles[kIndex].warps_n * kGemmTiles[kIndex].warp_m();
}
template <int kIndex>
PTX_DEVICE int warp_column() {
  return static_cast<int>(threadIdx.x) / 32 % kGemmTiles[kIndex].warps_n * kGemmTiles[kIndex].warp_n();
}

// sums += A B over `steps` steps of the sum. stage(step, slot) brings both operands of a step to shared + slot, B
// behind A; steps come in order. `idle`: a warp whose sums nobody needs. Afterwards shared memory is free.
template <class T, int kIndex, bool kATransposed, bool kBTransposed, class Stage>
PTX_DEVICE void multiply_steps(uint8_t* shared, int steps, bool idle, Stage& stage, Sums<kIndex>& sums) {
  constexpr GemmTile kTile = kGemmTiles[kIndex];
  constexpr int kAPitch = kATransposed ? 2 * kTile.m : 2 * kStep, kBPitch = kBTransposed ? 2 * kTile.n : 2 * kStep;
  const int row = warp_row<kIndex>(), column = warp_column<kIndex>();
  // A lane's address within a slot, but for the step and the fragment.
  const uint32_t ring = ptx::shared_address(shared);
  const uint32_t a_lane = ring + (kATransposed ? 0 : static_cast<uint32_t>(row * kAPitch));
  const uint32_t a_offset = kATransposed ? at_step(lane_offset_b(kAPitch), row / 16) : lane_offset_a(kAPitch);
  const uint32_t b_lane = ring + kTile.a_bytes() + (kBTransposed ? 0 : static_cast<uint32_t>(column * kBPitch));
  const uint32_t b_offset = kBTransposed ? at_step(lane_offset_a(kBPitch), column / 16) : lane_offset_b(kBPitch);

#pragma unroll 1
  for (int step = 0; step < kTile.stages - 1; ++step) {
    if (step < steps) stage(step, static_cast<uint32_t>(step * kTile.slot_bytes()));
    ptx::copy_commit();
  }
  int slot = 0, free = kTile.stages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::copy_wait<kTile.stages - 2>();
    ptx::syncthreads();  // the step has arrived, and nobody reads the one before it any longer: its slot is free
    if (step + kTile.stages - 1 < steps)
      stage(step + kTile.stages - 1, static_cast<uint32_t>(free * kTile.slot_bytes()));
    ptx::copy_commit();
    free = slot;
    const uint32_t at = static_cast<uint32_t>(slot * kTile.slot_bytes());
    slot = slot == kTile.stages - 1 ? 0 : slot + 1;
    if (idle) continue;
#pragma unroll
    for (int s = 0; s < kStep / 16; ++s) {
      uint32_t a[kTile.warp_m() / 16][4];
#pragma unroll
      for (int f = 0; f < kTile.warp_m() / 16; ++f) {
        if constexpr (kATransposed)
          ptx::ldmatrix_x4_trans(a[f], a_lane + at + 16 * s * kAPitch + at_step(a_offset, f));
        else
          ptx::ldmatrix_x4(a[f], a_lane + at + 16 * f * kAPitch + at_step(a_offset, s));
      }
#pragma unroll
      for (int g = 0; g < kTile.warp_n() / 16; ++g) {
        uint32_t b[4];
        if constexpr (kBTransposed)
          ptx::ldmatrix_x4_trans(b, b_lane + at + 16 * s * kBPitch + at_step(b_offset, g));
        else
          ptx::ldmatrix_x4(b, b_lane + at + 16 * g * kBPitch + at_step(b_offset, s));
#pragma unroll
        for (int f = 0; f < kTile.warp_m() / 16; ++f) {
          ptx::mma(T{}, sums[f][2 * g], a[f], b[0], b[1]);
          ptx::mma(T{}, sums[f][2 * g + 1], a[f], b[2], b[3]);
        }
      }
    }
  }
  ptx::copy_wait<0>();
  ptx::syncthreads();
}

// ---- the result ----------------------------------------------------------------------------------------------------

// Writes `rows` x `columns` of a tile in shared memory (pitch 2 * kColumns, swizzled) to global memory.
template <class T, int kRows, int kColumns, int kThreads>
PTX_DEVICE void store_tile(const uint8_t* shared, T* out, int64_t stride, int rows, int columns, bool vectors) {
  constexpr int kChunks = kColumns / 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks, count = smaller(columns - 8 * chunk, 8);
    if (row >= rows || count <= 0) continue;
    T* to = out + row * stride + 8 * chunk;
    const ptx::Vec16 x = *reinterpret_cast<const ptx::Vec16*>(shared + chunk_offset(2 * kColumns, row, chunk));
    if (vectors && count == 8) {
      ptx::store_global_16(to, x);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < count) to[e] = T{static_cast<uint16_t>(x.x[e / 2] >> 16 * (e % 2))};
    }
  }
}

}  // namespace cuda
}  // namespace llmcore
