// Decode attention over a paged cache, on any GPU from sm_80 up: the few new rows of a sequence, times all query heads
// of a KV head, are the M tile of mma.m16n8k16, so that the cache, which bounds the speed, is read once for all of
// them. The keys of a sequence are split among CTAs; a second kernel joins the splits in their order.
// docs/cuda-decode.md tells it from above.
#include "attention_decode.cuh"

#include <utility>

#include "launch.cuh"
#include "vec.cuh"

namespace llmcore {
namespace cuda {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f, kInfinity = __builtin_inff();

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
// The first that fits a call is taken. Keys and stages are as many as leave an SM of 164 KiB (sm_80) two CTAs with 16
// rows, so that one computes while another waits; 64 rows of 576 leave room for one.
constexpr Tile kTiles[] = {
    {64, 64, 16, 64, 3, 1, false},   {64, 64, 64, 64, 3, 1, false},    //
    {96, 96, 16, 64, 2, 1, false},   {96, 96, 64, 64, 2, 1, false},    // 16-bit caches only, see chunks below
    {128, 128, 16, 64, 2, 1, false}, {128, 128, 64, 64, 2, 1, false},  //
    {192, 128, 16, 64, 2, 1, false}, {192, 128, 64, 32, 2, 1, false},  // MLA, decompressed
    {256, 256, 16, 32, 2, 2, false}, {256, 256, 64, 32, 2, 2, false},  //
    {576, 512, 16, 32, 2, 2, true},  {576, 512, 64, 32, 2, 2, true},   // MLA
    {576, 512, 16, 32, 2, 2, false}, {576, 512, 64, 16, 2, 2, false},  // twice the bytes per key
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
  float k, v;
};
struct RowStats {
  float highest, total;  // of the exponents of 2 a row has seen, and the sum of their powers less the highest
};

// Everything about a kernel that is known when it is compiled; bytes of shared memory.
template <bool Int8, int Index>
struct Layout {
  static constexpr Tile kTile = kTiles[Index];
  static constexpr int kRowTiles = kTile.rows / 16;
  static constexpr int kWarps = kRowTiles == 1 ? 4 : kRowTiles * kTile.column_groups, kThreads = 32 * kWarps;
  static constexpr int kKeyGroups = kWarps / kRowTiles / kTile.column_groups;
  static constexpr int kGroupKeys = kTile.keys / kKeyGroups;           // whose probabilities a warp multiplies with V
  static constexpr int kOwnKeys = kGroupKeys / kTile.column_groups;    // whose scores it computes itself
  static constexpr int kColumns = kTile.v_head / kTile.column_groups;  // of V, per warp
  static constexpr int kElements = Int8 ? 16 : 8;                      // of the caches, in a chunk of 16 bytes
  static constexpr int kStages = Int8 ? 2 * kTile.stages - 1 : kTile.stages;  // as many bytes in flight
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
  static constexpr int kExchange0 = kScales0 + (Int8 ? kStages * kTile.keys * static_cast<int>(sizeof(KeyScales)) : 0);
  static constexpr int kExchange = kOwnKeys / 8 * 512;  // a warp's own scores
  static constexpr int kStats0 = kExchange0 + (kTile.column_groups > 1 ? kWarps * kExchange : 0);
  static constexpr int kBytes = kStats0 + (kKeyGroups > 1 ? kWarps * 16 * static_cast<int>(sizeof(RowStats)) : 0);

  static_assert(kOwnKeys % 8 == 0 && kGroupKeys % 16 == 0, "the N of scores and the K of P V");
  static_assert(K::kChunks % 4 == 0 && kColumns % (2 * kElements) == 0,
                "ldmatrix.x4 takes 4 chunks of a row of K, 2 of V");
};

constexpr bool tile_exists(bool int8, int index) { return !int8 || kTiles[index].head % 64 == 0; }

// ---- what the launcher decides -------------------------------------------------------------------------------------

struct Plan {
  int splits;
  bool q_vectors, k_vectors, v_vectors;  // rows can be copied 16 bytes at a time
  int64_t width;                         // of a row of partial sums: v_head_dim to a multiple of 16
  float* sums;                           // (total_q, heads, splits, width)
  RowStats* stats;                       // (total_q, heads, splits)
};

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

PTX_DEVICE ptx::Vec16 int8_chunk(const void* row, int first, int count) {
  ptx::Vec16 v{};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (first + i < count)
      v.x[i / 4] |= static_cast<uint32_t>(static_cast<const uint8_t*>(row)[first + i]) << 8 * (i % 4);
  return v;
}

PTX_DEVICE int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// One tile of K (operand 0) or V (1) of `dim` columns to shared memory, by the whole CTA.
template <class T, bool Int8, class Rows, int Keys, int Threads>
PTX_DEVICE void copy_tile(uint8_t* to, const void* cache, const KeyRow* rows, int operand, int dim, DType dtype,
                          bool vectors) {
  constexpr int kElements = Int8 ? 16 : 8;
  const auto* bytes = static_cast<const uint8_t*>(cache);
  for (int i = static_cast<int>(threadIdx.x); i < Keys * Rows::kChunks; i += Threads) {
    const int key = i / Rows::kChunks, chunk = i % Rows::kChunks, first = chunk * kElements;
    const int64_t offset = rows[key].offset[operand];
    uint8_t* at = to + Rows::at(key, chunk);
    const int count = offset < 0 ? 0 : dim;
    if (vectors) {
      const int size = clamp((count - first) * (16 / kElements), 0, 16);
      ptx::copy_async_16(ptx::shared_address(at), size ? bytes + offset + 16 * chunk : bytes, size);
    } else if constexpr (Int8) {
      *reinterpret_cast<ptx::Vec16*>(at) = int8_chunk(bytes + offset, first, count);
    } else {
      *reinterpret_cast<ptx::Vec16*>(at) = converted_chunk<T>(bytes + offset, dtype, first, count);
    }
  }
}

// Finds the rows of a CTA's keys: thread i those of key i of every tile. The way from the block table over an address
// to the copy is long, so each step is taken a tile ahead of the next: what is read from global memory waits in
// registers for one tile, then goes to shared memory, from where all threads copy one tile later.
template <bool Int8, class L>
class RowFinder {
 public:
  __device__ RowFinder(const AttentionParams& p, uint8_t* memory, int64_t b, int64_t kv_head, int first, int last)
      : p_(p),
        table_(p.shape.block_table + b * p.shape.table_stride),
        rows_(reinterpret_cast<KeyRow*>(memory + L::kRows0)),
        scales_(reinterpret_cast<KeyScales*>(memory + L::kScales0)),
        kv_head_(kv_head),
        key_(first + static_cast<int>(threadIdx.x)),
        last_(threadIdx.x < L::kTile.keys ? last : -1) {}

  // Begins to read the block of the thread's key in tile i.
  __device__ void look_up(int i) {
    const int key = key_ + i * L::kTile.keys;
    if (key <= last_) block_ = table_[static_cast<uint32_t>(key) / static_cast<uint32_t>(p_.shape.block_size)];
  }

  // Writes the offsets for tile i, the one looked up last, and begins to read its scales.
  __device__ void publish(int i) {
    if (threadIdx.x >= L::kTile.keys) return;
    const int key = key_ + i * L::kTile.keys;
    KeyRow row{{-1, -1}};
    if constexpr (Int8) next_ = {0.f, 0.f};
    if (key <= last_) {
      const int64_t block = block_, slot = static_cast<uint32_t>(key) % static_cast<uint32_t>(p_.shape.block_size);
      const int64_t size = p_.kv_dtype == DType::f32 ? 4 : p_.kv_dtype == DType::i8 ? 1 : 2;
      row.offset[0] = size * (block * p_.k_strides.batch + slot * p_.k_strides.row + kv_head_ * p_.k_strides.head);
      row.offset[1] = size * (block * p_.v_strides.batch + slot * p_.v_strides.row + kv_head_ * p_.v_strides.head);
      if constexpr (Int8) {
        const int64_t at = (block * p_.shape.block_size + slot) * p_.shape.kv_heads + kv_head_;
        next_ = {p_.k_scale[at], p_.v_scale[at]};
      }
    }
    rows_[i % 2 * L::kTile.keys + threadIdx.x] = row;
  }

  __device__ void publish_scales(int i) {
    if constexpr (Int8)
      if (threadIdx.x < L::kTile.keys) scales_[i % L::kStages * L::kTile.keys + threadIdx.x] = next_;
  }

  __device__ const KeyRow* rows(int i) const { return rows_ + i % 2 * L::kTile.keys; }

 private:
  const AttentionParams& p_;
  const int32_t* table_;
  KeyRow* rows_;
  KeyScales* scales_;
  int64_t kv_head_;
  int key_, last_;
  int block_ = 0;
  KeyScales next_;
};

// ---- int8 operands -------------------------------------------------------------------------------------------------

// Two of four signed bytes as 16-bit elements. `biased` is the bytes with their sign bits flipped, x + 128: put below
// the exponent of 2^23 they are the float 2^23 + 128 + x.
template <class T>
PTX_DEVICE uint32_t two_of(uint32_t biased, int low, int high) {
  const float a = ptx::from_bits(ptx::permute_bytes(biased, 0x4b000000u, 0x7540u + low)) - 8388736.f;
  const float b = ptx::from_bits(ptx::permute_bytes(biased, 0x4b000000u, 0x7540u + high)) - 8388736.f;
  return pack2(T{}, a, b);
}
constexpr uint32_t kSigns = 0x80808080u;

// ldmatrix of int8 rows gives lane (g, t) the columns 4t .. 4t+3 of 16, where a B fragment holds 2t, 2t+1, 2t+8, 2t+9.
// A dot product may take its terms in any order, so q is stored in this one: place i of 16 holds column key_column(i).
PTX_DEVICE int key_column(int i) { return i % 8 / 2 * 4 + i / 8 * 2 + i % 2; }

// What is rounded to 16 bits is p * scale * 128, that is p times (about) the largest value of the row: the same range
// as if the cache held 16-bit elements.
constexpr float kValueScale = 128.f;

// ---- the kernel ----------------------------------------------------------------------------------------------------

// One warp's state, and what it does with a tile.
template <class T, bool Int8, int Index>
struct Warp {
  using L = Layout<Int8, Index>;
  static constexpr Tile kTile = L::kTile;
  static constexpr int kScoreTiles = L::kGroupKeys / 8, kColumnTiles = L::kColumns / 8;

  uint8_t* memory;
  int warp, lane, row_tile, key_group, column_group;
  int first_key[2], last_key[2];  // what rows lane / 4 and lane / 4 + 8 see
  float acc[kColumnTiles][4];
  float highest[2], total[2];  // total: over the lane's own columns

  // s = q k^T of the warp's own keys
  __device__ void own_scores(const uint8_t* stage, float (&s)[L::kOwnKeys / 8][4]) {
    constexpr int kSteps = Int8 ? 4 : 2;  // products of 16 columns in 4 chunks of a row
    const uint32_t q = ptx::shared_address(memory), k = ptx::shared_address(stage);
    const int row = row_tile * 16 + lane % 16;
    const int key = key_group * L::kGroupKeys + column_group * L::kOwnKeys + lane % 8;
#pragma unroll
    for (int n = 0; n < L::kOwnKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
#pragma unroll
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
          if constexpr (Int8) {
            const uint32_t biased = b[j] ^ kSigns;
            ptx::mma(T{}, s[n], a[j], two_of<T>(biased, 0, 1), two_of<T>(biased, 2, 3));
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
        if constexpr (Int8) x *= scales[at].k;
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
        if constexpr (Int8) s[n][i] *= scales[column + 8 * n + i % 2].v * kValueScale;
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
        if constexpr (Int8) {
          // Transposed as 16-bit units, a register holds columns 2g, 2g+1 of two keys: column tiles 2i and 2i+1 are the
          // even and the odd columns of 16.
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t low = b[2 * i] ^ kSigns, high = b[2 * i + 1] ^ kSigns;
            ptx::mma(T{}, acc[4 * c + 2 * i], a, two_of<T>(low, 0, 2), two_of<T>(high, 0, 2));
            ptx::mma(T{}, acc[4 * c + 2 * i + 1], a, two_of<T>(low, 1, 3), two_of<T>(high, 1, 3));
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

  // Writes 16 columns of the two rows: x is column tiles 2c and 2c + 1.
  __device__ void write_columns(const Plan& plan, const int64_t (&place)[2], int c, const float (&x)[2][4]) const {
    const int column = column_group * L::kColumns + 16 * c;
    if (column >= plan.width) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (place[row] < 0) continue;
      float* to = plan.sums + place[row] * plan.width + column;
      const float a = x[0][2 * row], b = x[0][2 * row + 1], d = x[1][2 * row], e = x[1][2 * row + 1];
      struct alignas(8) Pair {
        float low, high;
      };
      if constexpr (Int8) {  // a, b are even columns, d, e odd ones
        constexpr float kUndo = 1.f / kValueScale;
        ptx::store_global_16(to + 4 * (lane % 4),
                             {ptx::bits(a * kUndo), ptx::bits(d * kUndo), ptx::bits(b * kUndo), ptx::bits(e * kUndo)});
      } else {
        reinterpret_cast<Pair*>(to)[lane % 4] = {a, b};
        reinterpret_cast<Pair*>(to)[4 + lane % 4] = {d, e};
      }
    }
  }

  // Joins the key groups and writes the CTA's partial sums. place: index of each row in plan.stats, or -1.
  __device__ void finish(const Plan& plan, const int64_t (&place)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      total[row] += ptx::shfl_xor(total[row], 1);
      total[row] += ptx::shfl_xor(total[row], 2);
    }
    if constexpr (L::kKeyGroups == 1) {
#pragma unroll
      for (int c = 0; c < kColumnTiles / 2; ++c) {
        const float x[2][4] = {{acc[2 * c][0], acc[2 * c][1], acc[2 * c][2], acc[2 * c][3]},
                               {acc[2 * c + 1][0], acc[2 * c + 1][1], acc[2 * c + 1][2], acc[2 * c + 1][3]}};
        write_columns(plan, place, c, x);
      }
    } else {
      auto* stats = reinterpret_cast<RowStats*>(memory + L::kStats0);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
        *merge_place(warp, n) = {ptx::bits(acc[n][0]), ptx::bits(acc[n][1]), ptx::bits(acc[n][2]),
                                 ptx::bits(acc[n][3])};
      if (lane % 4 == 0)
#pragma unroll
        for (int row = 0; row < 2; ++row) stats[warp * 16 + lane / 4 + 8 * row] = {highest[row], total[row]};
      ptx::syncthreads();
      float weight[L::kKeyGroups][2];
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
        write_columns(plan, place, c, x);
      }
    }
    if (key_group == 0 && column_group == 0 && lane % 4 == 0)
#pragma unroll
      for (int row = 0; row < 2; ++row)
        if (place[row] >= 0) plan.stats[place[row]] = {highest[row], total[row]};
  }
};

// The keys that query i sees by position, [first, last].
struct KeyRange {
  int first, last;
};
PTX_DEVICE KeyRange visible_keys(const AttentionMask& m, int64_t i, int64_t num_q, int64_t num_k) {
  const int64_t position = i + num_k - num_q;
  int64_t first = 0, last = num_k - 1;
  if (m.causal && position < last) last = position;
  if (m.window) {
    if (position - m.window + 1 > first) first = position - m.window + 1;
    if (position + m.window - 1 < last) last = position + m.window - 1;
  }
  return {static_cast<int>(first), static_cast<int>(last)};
}

// grid: (batch * splits, kv_heads)
template <class T, bool Int8, int Index>
__global__ void __launch_bounds__((Layout<Int8, Index>::kThreads)) decode(AttentionParams p, Plan plan) {
  using L = Layout<Int8, Index>;
  constexpr Tile kTile = L::kTile;
  PTX_SHARED_MEMORY(memory);
  const AttentionShape& s = p.shape;
  const int64_t b = blockIdx.x / plan.splits, split = blockIdx.x % plan.splits, kv_head = blockIdx.y;
  const int64_t query0 = s.cu_q ? s.cu_q[b] : b * s.seq_q;  // the first, among all
  const int64_t num_q = s.cu_q ? s.cu_q[b + 1] - query0 : s.seq_q, num_k = s.kv_lens[b];
  const int group = static_cast<int>(s.heads / s.kv_heads), rows = static_cast<int>(num_q) * group;

  Warp<T, Int8, Index> w;
  w.memory = memory;
  w.warp = static_cast<int>(threadIdx.x) / 32;
  w.lane = static_cast<int>(threadIdx.x) % 32;
  w.column_group = w.warp % kTile.column_groups;
  w.row_tile = w.warp / kTile.column_groups % L::kRowTiles;
  w.key_group = w.warp / kTile.column_groups / L::kRowTiles;

  // One round, unless cu_q gives one sequence the rows of others.
  for (int row0 = 0; row0 < rows; row0 += kTile.rows) {
    const int row_end = row0 + kTile.rows < rows ? row0 + kTile.rows : rows;
    // The union of what the rows see; each split takes the same number of tiles, the last ones less or nothing.
    const int first = visible_keys(p.mask, row0 / group, num_q, num_k).first;
    const int last = visible_keys(p.mask, (row_end - 1) / group, num_q, num_k).last;
    const int all_tiles = last < first ? 0 : (last - first) / kTile.keys + 1;
    const int share = (all_tiles + plan.splits - 1) / plan.splits;
    const int tile0 = static_cast<int>(split) * share;
    const int tiles = clamp(all_tiles - tile0, 0, share);
    const int key0 = first + tile0 * kTile.keys;

    int64_t place[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + w.row_tile * 16 + w.lane / 4 + 8 * i;
      const bool real = row < row_end;
      const KeyRange seen = visible_keys(p.mask, row / group, num_q, num_k);
      w.first_key[i] = seen.first;
      w.last_key[i] = real ? seen.last : -1;
      w.highest[i] = -kInfinity;
      w.total[i] = 0.f;
      place[i] = real ? ((query0 + row / group) * s.heads + kv_head * group + row % group) * plan.splits + split : -1;
    }
    if (tiles == 0) {  // nothing but the neutral element: the sums are not read
      if (w.key_group == 0 && w.column_group == 0 && w.lane % 4 == 0)
        for (int i = 0; i < 2; ++i)
          if (place[i] >= 0) plan.stats[place[i]] = {-kInfinity, 0.f};
      continue;
    }
#pragma unroll
    for (int n = 0; n < L::kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) w.acc[n][i] = 0.f;

    RowFinder<Int8, L> finder(p, memory, b, kv_head, key0, last);
    const auto copy = [&](int i) {
      if (i < tiles) {
        uint8_t* stage = memory + L::kStage0 + i % L::kStages * L::kStage;
        copy_tile<T, Int8, typename L::K, kTile.keys, L::kThreads>(
            stage, p.k, finder.rows(i), 0, static_cast<int>(s.head_dim), p.kv_dtype, plan.k_vectors);
        if constexpr (!L::kTile.latent)
          copy_tile<T, Int8, typename L::V, kTile.keys, L::kThreads>(
              stage + L::kV, p.v, finder.rows(i), 1, static_cast<int>(s.v_head_dim), p.kv_dtype, plan.v_vectors);
      }
      ptx::copy_commit();  // a group for every tile, so that they can be counted
    };

    // The queries, in the group of the first tile.
    for (int i = static_cast<int>(threadIdx.x); i < kTile.rows * L::Q::kChunks; i += L::kThreads) {
      const int r = i / L::Q::kChunks, chunk = i % L::Q::kChunks, row = row0 + r;
      const int count = row < row_end ? static_cast<int>(s.head_dim) : 0;
      uint8_t* at = memory + L::Q::at(r, chunk);
      const int64_t query = row / group + (s.cu_q ? query0 : 0);
      const T* q = static_cast<const T*>(p.q) + b * p.q_strides.batch + query * p.q_strides.row +
                   (kv_head * group + row % group) * p.q_strides.head;
      if constexpr (Int8) {
        ptx::Vec16 v{};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int column = chunk / 2 * 16 + key_column(chunk % 2 * 8 + e);
          if (column < count) v.x[e / 2] |= static_cast<uint32_t>(q[column].bits) << 16 * (e % 2);
        }
        *reinterpret_cast<ptx::Vec16*>(at) = v;
      } else if (plan.q_vectors) {
        const int size = clamp(2 * (count - 8 * chunk), 0, 16);
        ptx::copy_async_16(ptx::shared_address(at), size ? q + 8 * chunk : p.q, size);
      } else {
        *reinterpret_cast<ptx::Vec16*>(at) = converted_chunk<T>(q, p.q_dtype, 8 * chunk, count);
      }
    }

    finder.look_up(0);
#pragma unroll
    for (int i = 0; i < L::kStages - 1; ++i) {
      finder.publish(i);
      finder.publish_scales(i);
      finder.look_up(i + 1);
      ptx::syncthreads();
      copy(i);
    }
    finder.publish(L::kStages - 1);
    finder.look_up(L::kStages);
    for (int i = 0; i < tiles; ++i) {
      ptx::copy_wait<L::kStages - 2>();
      // Tile i is here for everyone, everyone is done with tile i - 1, and the rows of the next tile are published.
      ptx::syncthreads();
      const int ahead = i + L::kStages - 1;
      finder.publish_scales(ahead);
      copy(ahead);
      finder.publish(ahead + 1);
      finder.look_up(ahead + 2);
      const uint8_t* stage = memory + L::kStage0 + i % L::kStages * L::kStage;
      const auto* scales = reinterpret_cast<const KeyScales*>(memory + L::kScales0) + i % L::kStages * kTile.keys;
      float scores[L::kGroupKeys / 8][4];
      w.scores(stage, scores);
      w.softmax(p.mask, key0 + i * kTile.keys, scales, scores);
      w.add_values(stage, scores);
    }
    ptx::copy_wait<0>();
    ptx::syncthreads();  // the stages are free
    w.finish(plan, place);
    ptx::syncthreads();  // and again, for another round
  }
}

// Joins the splits of one row and head: grid (total_q * heads), a thread for 4 columns. The lanes of each warp share
// the splits among them and hand the weights around.
template <class T>
__global__ void combine(AttentionParams p, Plan plan) {
  const AttentionShape& s = p.shape;
  const int64_t row = blockIdx.x / s.heads, head = blockIdx.x % s.heads,
                place = blockIdx.x * static_cast<int64_t>(plan.splits);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const RowStats* stats = plan.stats + place;
  const float sink = p.mask.sinks ? p.mask.sinks[head] * kLog2e : -kInfinity;

  float top = sink;
  int used = 0;  // splits before the last that saw a key: their sums have been written
  for (int i = lane; i < plan.splits; i += 32) {
    top = fmaxf(top, stats[i].highest);
    if (stats[i].total != 0.f) used = i + 1;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    top = fmaxf(top, ptx::shfl_xor(top, step));
    const int other = static_cast<int>(ptx::shfl_xor(static_cast<uint32_t>(used), step));
    used = other > used ? other : used;
  }
  const float base = top == -kInfinity ? 0.f : top;
  float total = ptx::exp2(sink - base), sum[4] = {};
  const int64_t column = 4 * static_cast<int64_t>(threadIdx.x);
  for (int first = 0; first < used; first += 32) {
    float mine = 0.f, mine_total = 0.f;
    if (first + lane < used) {
      const RowStats x = stats[first + lane];
      mine = ptx::exp2(x.highest - base);
      mine_total = x.total * mine;
    }
    const int count = used - first < 32 ? used - first : 32;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const float weight = ptx::shfl(mine, i);
      total += ptx::shfl(mine_total, i);
      if (column < plan.width) {
        const ptx::Vec16 v = ptx::load_global_16(plan.sums + (place + first + i) * plan.width + column);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += weight * ptx::from_bits(v.x[j]);
      }
    }
  }
  const int64_t b = s.cu_q ? 0 : row / s.seq_q, query = s.cu_q ? row : row % s.seq_q;
  T* out = static_cast<T*>(p.out) + b * p.out_strides.batch + query * p.out_strides.row + head * p.out_strides.head;
  const float factor = total == 0.f ? 0.f : 1.f / total;
  for (int j = 0; j < 4; ++j)
    if (column + j < s.v_head_dim) out[column + j] = from_float<T>(sum[j] * factor);
  if (p.lse && threadIdx.x == 0)
    p.lse[b * p.lse_batch + head * p.lse_head + query] = total == 0.f ? -kInfinity : top * kLn2 + logf(total);
}

// ---- launching -----------------------------------------------------------------------------------------------------

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Query heads that share a KV head, for all rows of a sequence. cu_q is on the device: with as many rows as sequences
// it is taken to give each of them one, which is what decoding does; others are served too, only not as fast.
int64_t rows_of(const AttentionShape& s) { return s.heads / s.kv_heads * (s.cu_q ? 1 : s.seq_q); }

bool is_latent(const AttentionParams& p) {
  return p.k == p.v && p.k_scale == p.v_scale && p.k_strides.batch == p.v_strides.batch &&
         p.k_strides.row == p.v_strides.row && p.k_strides.head == p.v_strides.head &&
         p.shape.v_head_dim <= p.shape.head_dim;
}

int tile_for(const AttentionParams& p) {  // -1: none
  for (int i = 0; i < kNumTiles; ++i) {
    const Tile& t = kTiles[i];
    if (p.shape.head_dim <= t.head && p.shape.v_head_dim <= t.v_head && rows_of(p.shape) <= t.rows &&
        (!t.latent || is_latent(p)) && tile_exists(p.kv_dtype == DType::i8, i))
      return i;
  }
  return -1;
}

// f(std::integral_constant<int, i>) of the tile that is chosen.
template <bool Int8, int I = 0, class F>
Status with_tile(int chosen, const F& f) {
  if constexpr (I < kNumTiles) {
    if constexpr (tile_exists(Int8, I))
      if (chosen == I) return f(std::integral_constant<int, I>());
    return with_tile<Int8, I + 1>(chosen, f);
  } else {
    return "no tile for this head size";
  }
}

bool rows_aligned(const void* p, const RowStrides& s, int64_t element) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && s.batch * element % 16 == 0 && s.row * element % 16 == 0 &&
         s.head * element % 16 == 0;
}

// As many splits as fill the device once, while each has a few tiles to hide its start behind. kv_lens is on the
// device, so the table's size must do for a bound; CTAs whose sequence is shorter share what there is.
int choose_splits(const AttentionParams& p, const Device& device, const Tile& tile, int shared_bytes) {
  constexpr int64_t kMinTiles = 2, kSharedMemory = 164 * 1024;
  const AttentionShape& s = p.shape;
  int64_t keys = s.table_stride * s.block_size;
  const int64_t queries = s.cu_q ? s.total_q : s.seq_q;
  if (p.mask.window && p.mask.window < keys && 2 * p.mask.window + queries < keys) keys = 2 * p.mask.window + queries;
  const int64_t most = divide_up(keys, kMinTiles * tile.keys), tasks = s.batch * s.kv_heads;
  const int64_t room = kSharedMemory / shared_bytes * device.multiprocessors / (tasks ? tasks : 1);
  const int64_t splits = room < most ? room : most;
  return static_cast<int>(splits > 1 ? splits : 1);
}

Plan make_plan(const AttentionParams& p, const Device& device, const Tile& tile, int shared_bytes) {
  const AttentionShape& s = p.shape;
  Plan plan{};
  plan.splits = choose_splits(p, device, tile, shared_bytes);
  plan.width = divide_up(s.v_head_dim, 16) * 16;
  plan.q_vectors = rows_aligned(p.q, p.q_strides, 2);
  const bool as_they_are = p.kv_dtype == p.q_dtype || p.kv_dtype == DType::i8;
  const int64_t element = p.kv_dtype == DType::i8 ? 1 : 2;
  plan.k_vectors = as_they_are && rows_aligned(p.k, p.k_strides, element);
  plan.v_vectors = as_they_are && rows_aligned(p.v, p.v_strides, element);
  const int64_t partials = s.total_q * s.heads * plan.splits;
  plan.sums = static_cast<float*>(p.workspace);
  plan.stats = reinterpret_cast<RowStats*>(plan.sums + partials * plan.width);
  return plan;
}

template <class T, bool Int8>
Status run(const AttentionParams& p, const Device& device) {
  const AttentionShape& s = p.shape;
  return with_tile<Int8>(tile_for(p), [&](auto index) -> Status {
    using L = Layout<Int8, decltype(index)::value>;
    const Plan plan = make_plan(p, device, L::kTile, L::kBytes);
    if (Status error = launch(decode<T, Int8, decltype(index)::value>, {s.batch * plan.splits, s.kv_heads}, L::kThreads,
                              L::kBytes, device, p, plan))
      return error;
    const int threads = static_cast<int>(divide_up(plan.width, 128) * 32);
    return launch(combine<T>, {s.total_q * s.heads}, threads, 0, device, p, plan);
  });
}

template <class T>
Status run(const AttentionParams& p, const Device& device) {
  return p.kv_dtype == DType::i8 ? run<T, true>(p, device) : run<T, false>(p, device);
}

}  // namespace

bool attention_decode_serves(const AttentionParams& p) {
  const AttentionShape& s = p.shape;
  if (!s.block_table || p.mask.block_mask || p.q_dtype == DType::f32) return false;
  if (s.cu_q && s.total_q != s.batch) return false;
  // Positions and pages are 32-bit numbers on the device, kv_heads is a grid's y.
  if (s.block_size > INT32_MAX || s.kv_heads > 65535 || s.total_q * s.heads > INT32_MAX) return false;
  return tile_for(p) >= 0;
}

int64_t attention_decode_workspace(const AttentionParams& p, const Device& device) {
  int64_t bytes = 0;
  const auto measure = [&](auto int8) {
    with_tile<decltype(int8)::value>(tile_for(p), [&](auto index) -> Status {
      using L = Layout<decltype(int8)::value, decltype(index)::value>;
      const Plan plan = make_plan(p, device, L::kTile, L::kBytes);
      const int64_t row = plan.width * static_cast<int64_t>(sizeof(float)) + static_cast<int64_t>(sizeof(RowStats));
      bytes = p.shape.total_q * p.shape.heads * plan.splits * row;
      return nullptr;
    });
  };
  p.kv_dtype == DType::i8 ? measure(std::true_type()) : measure(std::false_type());
  return bytes;
}

Status attention_decode(const AttentionParams& p, const Device& device) {
  if (p.q_dtype == DType::bf16) return run<bf16>(p, device);
  if (p.q_dtype == DType::f16) return run<f16>(p, device);
  return "decode attention takes bfloat16 or float16 queries";
}

}  // namespace cuda
}  // namespace llmcore
