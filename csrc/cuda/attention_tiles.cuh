// The tile of work that one CTA of the attention kernels takes, by head size.
#pragma once
#include "ptx.cuh"

namespace llmcore {
namespace cuda {

// Bytes from one row of 16-bit elements in shared memory to the next.
__host__ __device__ constexpr int row_pitch(int columns) { return (columns + 63) / 64 * 128; }

// A CTA takes warps * fragments * 16 query rows against tiles of `keys` keys. K and V pass through a ring of kSlots
// buffers in shared memory, one "item" in each: `keys` rows of K (k_columns of them) or of V (v_columns).
struct Tile {
  int head_dim, v_head_dim;  // the head sizes it is for, as multiples of 16; 0: any
  int warps;
  int fragments;  // of 16 query rows per warp. Each B fragment read from shared memory meets all of them: with 1, the
                  // reads take as long as the products on sm_80 (256 bytes at 128 per clock, 4096 FLOP at 2048); 2
                  // halve it
  int keys;
  int k_columns, v_columns;   // of an item
  int v_items;                // V items whose accumulators a thread holds
  int ctas;                   // on a multiprocessor at a time, by registers and shared memory
  bool queries_in_registers;  // through the whole loop, else read from shared memory for every tile of keys

  __host__ __device__ constexpr int rows() const { return 16 * fragments * warps; }
  __host__ __device__ constexpr int threads() const { return 32 * warps; }
  __host__ __device__ constexpr bool any_head_dim() const { return head_dim == 0; }
  __host__ __device__ constexpr int out_columns() const { return v_columns * v_items; }
  __host__ __device__ constexpr int slot_bytes() const {
    return keys * row_pitch(k_columns > v_columns ? k_columns : v_columns);
  }
};

// While an item is worked on, the next two are on their way: those of one whole tile of keys.
constexpr int kSlots = 3;

// Registers of a thread: fragments * (v_columns * v_items / 2 accumulators + keys / 2 scores), of at most 255.
constexpr Tile kForwardTiles[] = {
    // 64 + 64 registers leave room for the queries (32). Shared: 16 + 3 * 8 KiB.
    {64, 64, 4, 2, 64, 64, 64, 1, 2, true},
    // 96 + 64 registers. Rows of 192 bytes take the room of 256: the swizzle permutes 128 bytes.
    {96, 96, 4, 2, 64, 96, 96, 1, 2, false},
    // 128 + 64 registers. Shared: 32 + 3 * 16 KiB, so that two CTAs fit into the 164 KiB of an sm_80.
    {128, 128, 4, 2, 64, 128, 128, 1, 2, false},
    // Shared: 48 + 3 * 24 KiB, one CTA: eight warps, to overlap the products of some with the exponentials of others.
    {192, 128, 8, 1, 64, 192, 128, 1, 1, false},
    // 128 + 32 registers. Shared: 64 + 3 * 32 KiB = 160 of at most 163 KiB.
    {256, 256, 8, 1, 64, 256, 256, 1, 1, false},
    // Any head size: as many items of 64 columns as K has; V by groups of 256 columns, one CTA for each group, which
    // forms the scores anew. 128 + 32 registers. Shared: 64 rows of the queries + 3 * 8 KiB.
    {0, 0, 4, 1, 64, 64, 64, 4, 2, false},
};

}  // namespace cuda
}  // namespace llmcore
