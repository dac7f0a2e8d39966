// Tiles of 16-bit elements in shared memory, and the fragments that tensor cores read from them and leave.
#pragma once
#include "ptx.cuh"
#include "vec.cuh"

namespace llmcore {
namespace cuda {

template <class I>
__host__ __device__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}
template <class I>
__host__ __device__ constexpr I smaller(I a, I b) {
  return a < b ? a : b;
}
template <class I>
__host__ __device__ constexpr I larger(I a, I b) {
  return a > b ? a : b;
}

// ---- tiles of rows in shared memory --------------------------------------------------------------------------------
//
// Row-major, a row's pitch a multiple of 128 bytes (row_pitch()). The 16-byte chunk c of row r lies at chunk c ^ (r %
// 8), so that the same chunk of eight neighbouring rows, which is what ldmatrix reads, covers all 32 banks.

PTX_DEVICE uint32_t chunk_offset(int pitch, int row, int chunk) {
  return static_cast<uint32_t>(row * pitch + ((chunk ^ row % 8) << 4));
}

// ---- fragments -----------------------------------------------------------------------------------------------------
//
// A lane's address for ldmatrix splits into a part that depends on the lane, computed once, and the step of 16 columns
// at hand: chunk 2 step + half, swizzled, is bits 5 and 6 flipped by step % 4, and 128 bytes for every four steps.

// A fragments of row-major rows; transposed, B fragments of rows along the sum: rows lane % 16, halves lane / 16.
PTX_DEVICE uint32_t lane_offset_a(int pitch) { return chunk_offset(pitch, threadIdx.x % 16, threadIdx.x % 32 / 16); }
// B fragments of rows across the sum: registers 0, 1 are rows 0-7, registers 2, 3 rows 8-15.
PTX_DEVICE uint32_t lane_offset_b(int pitch) {
  return chunk_offset(pitch, threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8, threadIdx.x / 8 % 2);
}
PTX_DEVICE uint32_t at_step(uint32_t lane_offset, int step) {
  return (lane_offset ^ (step % 4 * 32)) + static_cast<uint32_t>(step / 4 * 128);
}

// The maximum, and the sum, of a value over the four lanes that share a row of a C fragment.
PTX_DEVICE float row_max(float x) {
  x = fmaxf(x, ptx::shfl_xor(x, 1));
  return fmaxf(x, ptx::shfl_xor(x, 2));
}
PTX_DEVICE float row_sum(float x) {
  x += ptx::shfl_xor(x, 1);
  return x + ptx::shfl_xor(x, 2);
}

// Two neighbouring C fragments as 16-bit elements: an A fragment.
template <class T>
PTX_DEVICE void as_a_fragment(const float (&left)[4], const float (&right)[4], uint32_t (&a)[4]) {
  a[0] = pack2(T{}, left[0], left[1]);
  a[1] = pack2(T{}, left[2], left[3]);
  a[2] = pack2(T{}, right[0], right[1]);
  a[3] = pack2(T{}, right[2], right[3]);
}

}  // namespace cuda
}  // namespace llmcore
