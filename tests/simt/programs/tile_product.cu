// A 64 x 64 product as attention and matrix products do it: cp.async into two buffers, swizzled rows in shared memory,
// ldmatrix, mma. The depth is no multiple of the tile, so that the copies fill with zeros.
#include "memory.h"

namespace programs {
namespace {

using llmcore::bf16;
namespace ptx = llmcore::ptx;

enum class Bug {
  none,
  no_barrier_after_copy,
  wait_count_too_high,
  no_barrier_before_reuse,
  fragment_order,
  no_swizzle,
  misaligned_row,
  outside_shared_memory,
};

constexpr int kTile = 64, kThreads = 128, kRowBytes = kTile * 2, kTileBytes = kTile * kRowBytes;
constexpr int kStageBytes = 2 * kTileBytes;  // a slice of a, and one of b
constexpr int kCtas = 2, kDepth = 3 * kTile + 40;

struct ProductParams {
  const bf16* a;  // (CTAs * 64, depth)
  const bf16* b;  // (depth, 64)
  float* c;       // (CTAs * 64, 64)
};

// Where 16-byte chunk `chunk` of a row lies. The XOR puts one chunk of eight neighbouring rows in eight different
// banks.
template <Bug kBug>
PTX_DEVICE uint32_t place(int row, int chunk) {
  if (kBug != Bug::no_swizzle) chunk ^= row & 7;
  return row * kRowBytes + chunk * 16;
}

template <Bug kBug>
PTX_DEVICE void copy_slice(const ProductParams& p, uint32_t stage, int slice) {
  const bf16* a = p.a + static_cast<int64_t>(blockIdx.x) * kTile * kDepth;
  for (int i = threadIdx.x; i < kTile * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    const int a_k = slice * kTile + chunk * 8, b_k = slice * kTile + row;
    const bool in_a = a_k < kDepth, in_b = b_k < kDepth;
    ptx::copy_async_16(stage + place<kBug>(row, chunk), a + row * kDepth + (in_a ? a_k : 0), in_a ? 16 : 0);
    ptx::copy_async_16(stage + kTileBytes + place<kBug>(row, chunk), p.b + (in_b ? b_k : 0) * kTile + chunk * 8,
                       in_b ? 16 : 0);
  }
}

template <Bug kBug>
__global__ void __launch_bounds__(kThreads) tile_product(ProductParams p) {
  PTX_SHARED_MEMORY(memory);
  const uint32_t shared = ptx::shared_address(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kSlices = (kDepth + kTile - 1) / kTile;
  float c[8][4] = {};  // rows 16 * warp and up, 8 columns each
  copy_slice<kBug>(p, shared, 0);
  ptx::copy_commit();
  for (int slice = 0; slice < kSlices; ++slice) {
    const uint32_t a_tile = shared + slice % 2 * kStageBytes;
    const uint32_t b_tile = a_tile + (kBug == Bug::outside_shared_memory ? 2 : 1) * kTileBytes;
    if (slice + 1 < kSlices) copy_slice<kBug>(p, shared + (slice + 1) % 2 * kStageBytes, slice + 1);
    ptx::copy_commit();
    ptx::copy_wait<kBug == Bug::wait_count_too_high ? 2 : 1>();
    if (kBug != Bug::no_barrier_after_copy) ptx::syncthreads();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      uint32_t a[4];
      ptx::ldmatrix_x4(
          a, a_tile + place<kBug>(warp * 16 + lane % 16, 2 * k + lane / 16) + (kBug == Bug::misaligned_row ? 8 : 0));
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t b[4];  // 16 rows of columns 8n and up in b[0], b[1]; of 8n + 8 and up in b[2], b[3]
        ptx::ldmatrix_x4_trans(b, b_tile + place<kBug>(k * 16 + lane % 16, n + lane / 16));
        constexpr int kSecond = kBug == Bug::fragment_order ? 2 : 1;
        ptx::mma(bf16{}, c[n], a, b[0], b[kSecond]);
        ptx::mma(bf16{}, c[n + 1], a, b[3 - kSecond], b[3]);
      }
    }
    if (kBug != Bug::no_barrier_before_reuse) ptx::syncthreads();
  }
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = blockIdx.x * kTile + warp * 16 + lane / 4 + i / 2 * 8, column = n * 8 + lane % 4 * 2 + i % 2;
      p.c[row * kTile + column] = c[n][i];
    }
}

bf16 to_bf16(int small) { return {static_cast<uint16_t>(word(static_cast<float>(small)) >> 16)}; }

template <Bug kBug>
Outcome run() {
  Array<bf16> a(kCtas * kTile * kDepth), b(kDepth * kTile);
  Array<float> c(kCtas * kTile * kTile);
  std::vector<int> a_values(a.size()), b_values(b.size());
  SmallIntegers integers;
  for (size_t i = 0; i < a.size(); ++i) a[i] = to_bf16(a_values[i] = integers.next());
  for (size_t i = 0; i < b.size(); ++i) b[i] = to_bf16(b_values[i] = integers.next());
  std::vector<float> expected(c.size());
  for (int row = 0; row < kCtas * kTile; ++row)
    for (int column = 0; column < kTile; ++column) {
      int sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a_values[row * kDepth + k] * b_values[k * kTile + column];
      expected[row * kTile + column] = static_cast<float>(sum);
    }
#ifndef __CUDACC__
  simt::counters() = {};
#endif
  const auto status = finished(llmcore::cuda::launch(tile_product<kBug>, {kCtas}, kThreads, 2 * kStageBytes, kDevice,
                                                     ProductParams{a.data(), b.data(), c.data()}));
  Outcome outcome = compare(status, c, expected);
#ifndef __CUDACC__
  const simt::Counters& counted = simt::counters();
  if (outcome.seen == Seen::right && counted.ldmatrix_wavefronts != counted.ldmatrix_matrices)
    outcome = {Seen::bank_conflicts,
               std::to_string(static_cast<double>(counted.ldmatrix_wavefronts) / counted.ldmatrix_matrices) +
                   " wavefronts for each matrix"};
#endif
  return outcome;
}

}  // namespace

Correct correct_tile_product() { return {"tile_product", run<Bug::none>}; }

#ifndef __CUDACC__
std::vector<Planted> planted_in_tile_product() {
  using enum Seen;
  return {
      {"tile_product/no_barrier_after_copy", run<Bug::no_barrier_after_copy>, wrong_numbers, wrong_numbers, true, true},
      {"tile_product/wait_count_too_high", run<Bug::wait_count_too_high>, wrong_numbers, right, true, true},
      {"tile_product/no_barrier_before_reuse", run<Bug::no_barrier_before_reuse>, wrong_numbers, wrong_numbers, true,
       true},
      {"tile_product/fragment_order", run<Bug::fragment_order>, wrong_numbers, wrong_numbers, false, false},
      {"tile_product/no_swizzle", run<Bug::no_swizzle>, bank_conflicts, bank_conflicts, false, false, "8.0"},
      {"tile_product/misaligned_row", run<Bug::misaligned_row>, error, error, false, false, "not a multiple of 16"},
      {"tile_product/outside_shared_memory", run<Bug::outside_shared_memory>, error, error, true, true,
       "outside the 32768 bytes of shared memory"},
  };
}
#endif

}  // namespace programs
