// What decode attention works on at a time, where it lies in shared memory, and how it gets there.
#pragma once
#include "llmcore/attention.h"
#include "vec.cuh"

namespace llmcore {
namespace cuda {
namespace decode {

// ---- tiles ---------------------------------------------------------------------------------------------------------

// A CTA's share of the work at a time. Each warp has 16 rows, keys / key groups of the keys, and v_head / column_groups
// of the columns of v: its accumulator takes 8 registers a lane for every 16 columns, hence column groups where v is
// wide. With 16 rows there are 4 warps, with 64 rows 4 * column_groups.
struct Tile {
  int head, v_head;   // head sizes of q and k, and of v; smaller ones are padded with zeros in shared memory
  int rows;           // of queries: (new token, query head of the group)
  int keys;           // per stage
  int stages;         // of K and V in shared memory, all but one of them in flight
  int column_groups;  // a power of 2
  bool latent;        // v is the first columns of k, the same memory: MLA's compressed cache
};
// Head sizes with tiles of 16 and of 64 rows; which one is taken: tile_for(). Keys and stages are such that an SM of
// sm_80 (164 KiB of shared memory) holds two CTAs of 16 rows where it can, so that one computes while the other waits,
// and every tile fits the 163 KiB of a CTA.
constexpr Tile kTiles[] = {
    {64, 64, 16, 64, 3, 1, false},   {64, 64, 64, 64, 3, 1, false},
    {96, 96, 16, 64, 2, 1, false},  // 16-bit caches only: tile_exists()
    {96, 96, 64, 64, 2, 1, false},   {128, 128, 16, 64, 2, 1, false},
    {128, 128, 64, 64, 2, 1, false}, {192, 128, 16, 64, 2, 1, false},  // MLA, decompressed
    {192, 128, 64, 32, 2, 1, false}, {256, 256, 16, 32, 2, 2, false},
    {256, 256, 64, 32, 2, 2, false}, {576, 512, 16, 32, 2, 4, true},   // MLA
    {576, 512, 64, 32, 2, 2, true},  {576, 512, 16, 32, 2, 4, false},  // twice the bytes for a key
    {576, 512, 64, 16, 2, 2, false},
};
constexpr int kNumTiles = sizeof(kTiles) / sizeof(kTiles[0]);

// A tile of rows in shared memory, in chunks of 16 bytes. ldmatrix reads the same chunk of 8 consecutive rows: their
// addresses must differ modulo 128 bytes, which an XOR with the row does as far as the row length doesn't by itself.
template <int Chunks>
struct SwizzledRows {
  static constexpr int kChunks = Chunks, kBytes = 16 * Chunks;
  static constexpr int kRun = Chunks % 8 == 0 ? 8 : Chunks % 4 == 0 ? 4 : Chunks % 2 == 0 ? 2 : 1;
  PTX_DEVICE uint32_t at(uint32_t row, uint32_t chunk) {
    return (row * Chunks + (chunk ^ row / (8 / kRun) % kRun)) * 16;
  }
};

struct KeyRow {
  int64_t offset[2];  // of the key's rows in the caches of K and V, in bytes; -1: no key, zeros
};
struct KeyScales {
  float k, v;  // what its scores and its probabilities are multiplied with
};
// The rows [first, end) of sequence b, whose first query is query0 among all. What is needed in the end waits in shared
// memory, for accumulators take nearly all registers.
struct RowTile {
  int b, query0, first, end;
};
struct RowStats {
  float highest, total;  // of the exponents of 2 a row has seen, and the sum of their powers less the highest
};

// In shared memory the caches' elements have the type C: that of the queries, T, or one of 8 bits with scales.
template <class C>
constexpr bool kEightBit = sizeof(C) == 1;
// An element of 8 bits enters a product as element * kUnit, which is cheap to make of its bits. A probability is
// multiplied with scale * kRange before it is rounded to 16 bits: it then is about p times the largest value of the
// row, the same range as if the cache held 16-bit elements.
template <class C>
struct EightBit {  // 16 bits: as they are
  static constexpr float kUnit = 1.f, kRange = 1.f;
};
template <>
struct EightBit<int8_t> {
  static constexpr float kUnit = 1.f, kRange = 128.f;
};
template <>
struct EightBit<f8> {
  static constexpr float kUnit = 1.f / 256, kRange = 256.f;
};

// Everything about a kernel that is known when it is compiled; bytes of shared memory.
template <class C, int Index>
struct Layout {
  static constexpr Tile kTile = kTiles[Index];
  static constexpr int kRowTiles = kTile.rows / 16;
  static constexpr int kWarps = kRowTiles == 1 ? 4 : kRowTiles * kTile.column_groups, kThreads = 32 * kWarps;
  static constexpr int kKeyGroups = kWarps / kRowTiles / kTile.column_groups;
  static constexpr int kGroupKeys = kTile.keys / kKeyGroups;           // whose probabilities a warp multiplies with V
  static constexpr int kOwnKeys = kGroupKeys / kTile.column_groups;    // whose scores it computes itself
  static constexpr int kColumns = kTile.v_head / kTile.column_groups;  // of V, per warp
  static constexpr int kElements = kEightBit<C> ? 16 : 8;              // of the caches, in a chunk of 16 bytes
  static constexpr int kStages = kEightBit<C> ? 2 * kTile.stages - 1 : kTile.stages;  // as many bytes in flight
  using Q = SwizzledRows<kTile.head / 8>;
  using K = SwizzledRows<kTile.head / kElements>;
  using V = SwizzledRows<(kTile.latent ? kTile.head : kTile.v_head) / kElements>;

  static constexpr int kStage0 = kTile.rows * Q::kBytes;
  static constexpr int kV = kTile.latent ? 0 : kTile.keys * K::kBytes;  // within a stage
  static constexpr int kStage = kV + kTile.keys * V::kBytes;
  // At the end the accumulators of the key groups meet where the stages were.
  static constexpr int kAccumulator = kColumns / 8 * 512, kMerge = kKeyGroups > 1 ? kWarps *kAccumulator : 0;
  static constexpr int kRows0 =
      kStage0 +
      (kStages * kStage > kMerge ? kStages * kStage : kMerge);  // KeyRow of the next tiles to be copied, two of them
  static constexpr int kScales0 = kRows0 + 2 * kTile.keys * static_cast<int>(sizeof(KeyRow));
  static constexpr int kExchange0 =
      kScales0 + (kEightBit<C> ? kStages * kTile.keys * static_cast<int>(sizeof(KeyScales)) : 0);
  static constexpr int kExchange = kOwnKeys / 8 * 512;  // a warp's own scores
  static constexpr int kStats0 = kExchange0 + (kTile.column_groups > 1 ? kWarps * kExchange : 0);
  static constexpr int kRowTile0 = kStats0 + (kKeyGroups > 1 ? kWarps * 16 * static_cast<int>(sizeof(RowStats)) : 0);
  static constexpr int kBytes = kRowTile0 + static_cast<int>(sizeof(RowTile));
  // The output passes where the queries were. Rows are shifted against each other by 16 bytes, which takes no register
  // for addresses; that reaches into the stages, so where key groups meet there, chunks are permuted instead.
  PTX_DEVICE uint32_t output_at(uint32_t row, uint32_t column) {
    return kKeyGroups > 1 ? Q::at(row, column / 8) + column % 8 * 2 : row * (2 * kTile.v_head + 16) + 2 * column;
  }

  // CTAs that a multiprocessor has registers for.
  static constexpr int kCtas = kThreads > 128 ? 1 : 2;
  // And shared memory, of which each takes 1 KiB for the system, and one CTA may have all the rest.
  static constexpr int ctas(int shared_bytes) {
    const int fit = (shared_bytes + 1024) / (kBytes + 1024);
    return fit < 1 ? 1 : fit < kCtas ? fit : kCtas;
  }

  static_assert(kBytes <= 163 * 1024, "what a CTA may have");
  static_assert(kOwnKeys % 8 == 0 && kGroupKeys % 16 == 0, "the N of scores and the K of P V");
  static_assert(K::kChunks % 4 == 0 && kColumns % (2 * kElements) == 0,
                "ldmatrix.x4 takes 4 chunks of a row of K, 2 of V");
};

// The product of q and an 8-bit K takes 64 columns at a time.
constexpr bool tile_exists(bool eight_bit, int index) { return !eight_bit || kTiles[index].head % 64 == 0; }

// ---- the caches, on their way to shared memory ---------------------------------------------------------------------

PTX_DEVICE float element(const void* base, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::bf16: return to_float(static_cast<const bf16*>(base)[index]);
    case DType::f16: return to_float(static_cast<const f16*>(base)[index]);
    default: return static_cast<const float*>(base)[index];
  }
}

// Elements [first, first + 8) of a row of `count`, as T; zeros beyond.
template <class T>
PTX_DEVICE ptx::Vec16 converted_chunk(const void* row, DType dtype, int first, int count) {
  ptx::Vec16 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = first + 2 * i;
    const float low = at < count ? element(row, dtype, at) : 0.f;
    v.x[i] = pack2(T{}, low, at + 1 < count ? element(row, dtype, at + 1) : 0.f);
  }
  return v;
}

PTX_DEVICE ptx::Vec16 byte_chunk(const void* row, int first, int count) {
  ptx::Vec16 v{};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (first + i < count)
      v.x[i / 4] |= static_cast<uint32_t>(static_cast<const uint8_t*>(row)[first + i]) << 8 * (i % 4);
  return v;
}

PTX_DEVICE int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// One tile of K (operand 0) or V (1) of `dim` columns to shared memory, by the whole CTA: by asynchronous copies if
// rows are aligned and hold what the product takes, else element by element, here and now.
template <class T, class C, class Rows, int Keys, int Threads>
PTX_DEVICE void copy_tile(uint8_t* to, const void* cache, const KeyRow* rows, int operand, int dim, DType dtype,
                          bool vectors) {
  constexpr int kElements = kEightBit<C> ? 16 : 8, kChunks = Rows::kChunks;
  const auto* bytes = static_cast<const uint8_t*>(cache);
  const int thread = static_cast<int>(threadIdx.x);
  if (vectors) {
    // Where a thread stays in its column of chunks, addresses are a constant apart; else they would fill registers.
#pragma unroll(Threads % kChunks == 0 ? 8 : 1)
    for (int i = thread; i < Keys * kChunks; i += Threads) {
      const int64_t offset = rows[i / kChunks].offset[operand];
      const int size = offset < 0 ? 0 : clamp(dim * (16 / kElements) - 16 * (i % kChunks), 0, 16);
      ptx::copy_async_16(ptx::shared_address(to + Rows::at(i / kChunks, i % kChunks)),
                         size ? bytes + offset + 16 * (i % kChunks) : bytes, size);
    }
    return;
  }
#pragma unroll 1
  for (int i = thread; i < Keys * kChunks; i += Threads) {
    const int64_t offset = rows[i / kChunks].offset[operand];
    const int first = i % kChunks * kElements, count = offset < 0 ? 0 : dim;
    auto* at = reinterpret_cast<ptx::Vec16*>(to + Rows::at(i / kChunks, i % kChunks));
    if constexpr (kEightBit<C>)
      *at = byte_chunk(bytes + offset, first, count);
    else
      *at = converted_chunk<T>(bytes + offset, dtype, first, count);
  }
}

// Finds the rows of a CTA's keys: thread i those of key i of every tile. The way from the block table over an address
// to the copy is long, so each step is taken a tile ahead of the next: what is read from global memory waits in
// registers for one tile, then goes to shared memory, from where all threads copy one tile later.
template <class C, class L>
class RowFinder {
 public:
  __device__ RowFinder(const AttentionParams& p, uint8_t* memory, int b, int kv_head, int first, int last)
      : p_(p),
        rows_(reinterpret_cast<KeyRow*>(memory + L::kRows0)),
        scales_(reinterpret_cast<KeyScales*>(memory + L::kScales0)),
        b_(b),
        kv_head_(kv_head),
        first_(first),
        last_(last) {}

  // Begins to read the block of the thread's key in tile i.
  __device__ void look_up(int i) {
    const int key = key_of(i);
    if (threadIdx.x < L::kTile.keys && key <= last_)
      block_ = p_.shape.block_table[b_ * p_.shape.table_stride +
                                    static_cast<uint32_t>(key) / static_cast<uint32_t>(p_.shape.block_size)];
  }

  // Writes the offsets for tile i, the one looked up last, and begins to read its scales.
  __device__ void publish(int i) {
    if (threadIdx.x >= L::kTile.keys) return;
    const int key = key_of(i);
    KeyRow row{{-1, -1}};
    if constexpr (kEightBit<C>) next_ = {0.f, 0.f};
    if (key <= last_) {
      const int64_t block = block_, slot = static_cast<uint32_t>(key) % static_cast<uint32_t>(p_.shape.block_size);
      const int64_t size = p_.kv_dtype == DType::f32 ? 4 : sizeof(C);
      row.offset[0] = size * (block * p_.k_strides.batch + slot * p_.k_strides.row + kv_head_ * p_.k_strides.head);
      row.offset[1] = size * (block * p_.v_strides.batch + slot * p_.v_strides.row + kv_head_ * p_.v_strides.head);
      if constexpr (kEightBit<C>) {
        const int64_t at = (block * p_.shape.block_size + slot) * p_.shape.kv_heads + kv_head_;
        next_ = {p_.k_scale[at] * (1 / EightBit<C>::kUnit), p_.v_scale[at] * EightBit<C>::kRange};
      }
    }
    rows_[i % 2 * L::kTile.keys + threadIdx.x] = row;
  }

  __device__ void publish_scales(int i) {
    if constexpr (kEightBit<C>)
      if (threadIdx.x < L::kTile.keys) scales_[i % L::kStages * L::kTile.keys + threadIdx.x] = next_;
  }

  __device__ const KeyRow* rows(int i) const { return rows_ + i % 2 * L::kTile.keys; }

 private:
  __device__ int key_of(int i) const { return first_ + i * L::kTile.keys + static_cast<int>(threadIdx.x); }

  const AttentionParams& p_;
  KeyRow* rows_;
  KeyScales* scales_;
  int b_, kv_head_, first_, last_;
  int block_ = 0;
  KeyScales next_;
};

}  // namespace decode
}  // namespace cuda
}  // namespace llmcore
