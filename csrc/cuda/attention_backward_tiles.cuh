// The tiles of attention's backward kernels.
#pragma once
#include <iterator>

namespace llmcore {
namespace cuda {

// What a CTA owns, and what it makes of it.
enum class Pass {
  keys,     // dK and dV of a tile of keys
  queries,  // dQ of a tile of queries
  fused,    // dK and dV of a tile of keys, and its addition to the dQ of every query that it meets
};
__host__ __device__ constexpr bool owns_keys(Pass pass) { return pass != Pass::queries; }

constexpr int kWalkBytes = 128;  // at the start of shared memory: where the CTA is (Walk)

// Warps stand in `groups`. The `split` warps of a group share blocks * 16 rows of the owned tile: each takes its share
// of the streamed rows' scores (`step` of them) and its share of the gradients' columns.
struct BackwardTile {
  int dim, v_dim;  // the head sizes it serves, up to these
  int blocks, split, groups, step;

  __host__ __device__ constexpr int warps() const { return groups * split; }
  __host__ __device__ constexpr int threads() const { return warps() * 32; }
  __host__ __device__ constexpr int owned() const { return groups * blocks * 16; }
  __host__ __device__ constexpr int streamed() const { return split * step; }
  __host__ __device__ constexpr int owned_bytes() const { return owned() * (dim + v_dim) * 2; }
  __host__ __device__ constexpr int stream_bytes() const { return streamed() * (dim + v_dim) * 2; }
  __host__ __device__ constexpr int scores_bytes() const { return owned() * streamed() * 2; }
  // Tiles of scores that warps show each other: dS, then P.
  __host__ __device__ constexpr int shown(Pass pass) const { return split > 1 ? 2 : pass == Pass::fused ? 1 : 0; }
  __host__ __device__ constexpr int shared_bytes(Pass pass) const {
    return kWalkBytes + owned_bytes() + 2 * (stream_bytes() + (owns_keys(pass) ? streamed() * 8 : 0)) +
           shown(pass) * scores_bytes();
  }
  // A tile's dQ is dealt out to warps in pieces of dq_blocks() * 16 queries and dq_columns() columns.
  __host__ __device__ constexpr int dq_blocks() const { return dim % (warps() * 32 / streamed() * 16) == 0 ? 2 : 1; }
  __host__ __device__ constexpr int dq_columns() const { return dim / (warps() * dq_blocks() * 16 / streamed()); }
};

// What decides: a thread has at most 255 registers, of which the gradients take blocks * (dim + v_dim) / (2 * split)
// (without v_dim where queries are owned) and the scores blocks * step. A fragment of the stream serves `blocks`
// products, so that with 1 the tensor cores wait for shared memory. Shared memory: 99 KB on sm_86 and sm_89, 163 on
// sm_80, 227 on sm_90; the first tile that holds the head sizes and fits the device is taken.
constexpr BackwardTile kKeyTiles[] = {
    // dim v_dim blocks split groups step
    {64, 64, 2, 1, 4, 32},    // 49 KB: two CTAs on a multiprocessor
    {96, 96, 1, 1, 4, 64},    // 73 KB
    {128, 128, 2, 2, 4, 32},  // 161 KB: two warps share the columns, so that two blocks of rows fit in registers
    {128, 128, 1, 1, 8, 32},  // 97 KB
    {192, 128, 1, 2, 4, 32},  // 137 KB
    {192, 128, 1, 2, 4, 16},  // 89 KB
    {256, 256, 2, 4, 2, 16},  // 209 KB
    {256, 256, 1, 2, 4, 16},  // 137 KB
};
constexpr BackwardTile kQueryTiles[] = {
    {64, 64, 2, 1, 4, 32},    // 48 KB
    {96, 96, 2, 1, 4, 32},    // 72 KB
    {128, 128, 2, 1, 4, 32},  // 96 KB
    {192, 128, 1, 1, 4, 32},  // 80 KB
    {256, 256, 1, 1, 4, 32},  // 128 KB
};
// With more keys in a tile there are fewer additions to dQ, in memory, for each product.
constexpr BackwardTile kFusedTiles[] = {
    {64, 64, 2, 1, 4, 32},    // 57 KB: two CTAs on a multiprocessor
    {96, 96, 1, 1, 4, 64},    // 81 KB
    {128, 128, 2, 2, 4, 32},  // 161 KB
    {128, 128, 1, 1, 4, 32},  // 69 KB
    {192, 128, 1, 2, 4, 32},  // 137 KB
    {192, 128, 1, 2, 4, 16},  // 89 KB
    {256, 256, 2, 4, 2, 16},  // 209 KB
    {256, 256, 1, 2, 4, 16},  // 137 KB
};
template <Pass kPass>
__host__ __device__ constexpr const auto& tiles() {
  if constexpr (kPass == Pass::keys)
    return kKeyTiles;
  else if constexpr (kPass == Pass::queries)
    return kQueryTiles;
  else
    return kFusedTiles;
}

// Which entry of its table serves a call; the table's size where none does.
template <Pass kPass>
constexpr int tile_for(int64_t dim, int64_t v_dim, int shared_bytes) {
  int entry = 0;
  for (const BackwardTile& tile : tiles<kPass>()) {
    if (dim <= tile.dim && v_dim <= tile.v_dim && tile.shared_bytes(kPass) <= shared_bytes) break;
    ++entry;
  }
  return entry;
}

// Every other head size: the gradients' columns are dealt out to CTAs (the grid's z), and each sums S and dP over
// slices of the head dimension. 4 warps own 16 rows each.
constexpr int kSlice = 64, kSlicedOwned = 64, kSlicedStreamed = 32, kSlicedThreads = 128;
constexpr int kSliceBytes = (kSlicedOwned + kSlicedStreamed) * kSlice * 2;
__host__ __device__ constexpr int sliced_columns(bool keys) { return keys ? 128 : 256; }  // of dK and of dV; of dQ

}  // namespace cuda
}  // namespace llmcore
