// The one file with inline PTX. nvcc sees instructions; a host compiler sees calls into the emulator of tests/simt,
// which runs the same kernels on a CPU. Kernels therefore touch what is special about a GPU only through this file.
//
// Semantics: PTX ISA 8.x, the section named like the instruction. Fragments of m16n8k16, for lane l, g = l / 4, t = l %
// 4 (a 32-bit register holds two 16-bit elements, the one of the lower index in its low half):
//   A (16 x 16): a[0] = A[g][2t, 2t+1], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..], a[3] = A[g+8][2t+8..]
//   B (16 x 8):  b0 = B[2t, 2t+1][g], b1 = B[2t+8, 2t+9][g]
//   C (16 x 8):  c[0], c[1] = C[g][2t, 2t+1], c[2], c[3] = C[g+8][2t, 2t+1]
// So the C of two neighbouring 16 x 8 tiles, packed to 16 bits, is an A fragment.
#pragma once
#include <cstdint>

#include "llmcore/dtype.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define PTX_DEVICE static __device__ __forceinline__
#define PTX_SHARED_MEMORY(name) extern __shared__ __align__(1024) uint8_t name[]  // dynamic shared memory
#else
#include <cmath>
#include <cstring>

#include "simt.h"
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define PTX_DEVICE static inline
#define PTX_SHARED_MEMORY(name) uint8_t* name = simt::shared_memory()
#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_dim())
#define gridDim (simt::grid_dim())
#endif

namespace llmcore {
namespace ptx {

constexpr uint32_t kFullMask = 0xffffffffu;

struct alignas(16) Vec16 {
  uint32_t x[4];
};

#ifdef __CUDACC__

PTX_DEVICE uint32_t bits(float x) { return __float_as_uint(x); }
PTX_DEVICE float from_bits(uint32_t x) { return __uint_as_float(x); }

// ---- memory
PTX_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
PTX_DEVICE Vec16 load_global_16(const void* p) {  // read once: around L1
  Vec16 v;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
               : "l"(p)
               : "memory");
  return v;
}
PTX_DEVICE Vec16 load_cached_16(const void* p) {  // read by many threads: through L1
  Vec16 v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
               : "l"(p)
               : "memory");
  return v;
}
PTX_DEVICE void store_global_16(void* p, const Vec16& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x[0]), "r"(v.x[1]), "r"(v.x[2]), "r"(v.x[3])
               : "memory");
}
// Of shared memory, by any threads of a CTA in any order. shared_add gives what was there before.
PTX_DEVICE uint32_t shared_add(uint32_t* p, uint32_t x) {
  uint32_t before;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(shared_address(p)), "r"(x) : "memory");
  return before;
}
PTX_DEVICE void shared_or(uint32_t* p, uint32_t x) {
  asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(shared_address(p)), "r"(x) : "memory");
}
PTX_DEVICE void red_add(float* p, float x) { asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory"); }
PTX_DEVICE uint64_t atomic_add(uint64_t* p, uint64_t x) {  // what was there before
  uint64_t before;
  asm volatile("atom.global.add.u64 %0, [%1], %2;" : "=l"(before) : "l"(p), "l"(x) : "memory");
  return before;
}
PTX_DEVICE uint64_t atomic_max(uint64_t* p, uint64_t x) {
  uint64_t before;
  asm volatile("atom.global.max.u64 %0, [%1], %2;" : "=l"(before) : "l"(p), "l"(x) : "memory");
  return before;
}
PTX_DEVICE void red_add(int32_t* p, int32_t x) {  // in global or shared memory
  asm volatile("red.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
#ifdef __CUDA_ARCH__
constexpr bool kRedByLane = __CUDA_ARCH__ >= 900;  // see read_sums()
#endif
#ifndef __CUDA_ARCH__
constexpr bool kRedByLane = true;  // the host's pass
#endif
PTX_DEVICE void red_add_warp(float* at, const float (&x)[4]) {
  if constexpr (kRedByLane) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at + 4 * (threadIdx.x % 32)), "f"(x[0]),
                 "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) red_add(at + 32 * i + threadIdx.x % 32, x[i]);
  }
}

// ---- synchronisation and exchange
PTX_DEVICE void syncthreads() { __syncthreads(); }
PTX_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
PTX_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
PTX_DEVICE void syncwarp() { __syncwarp(); }
PTX_DEVICE uint32_t shfl(uint32_t x, int from_lane) { return __shfl_sync(kFullMask, x, from_lane); }
PTX_DEVICE uint32_t shfl_xor(uint32_t x, int lane_mask) { return __shfl_xor_sync(kFullMask, x, lane_mask); }
PTX_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(kFullMask, predicate); }
// Of the warp's 32 values (redux.sync), for every lane.
PTX_DEVICE uint32_t warp_max(uint32_t x) { return __reduce_max_sync(kFullMask, x); }
PTX_DEVICE uint32_t warp_min(uint32_t x) { return __reduce_min_sync(kFullMask, x); }

// ---- between grids: programmatic dependent launch (sm_90; before, a grid starts when the one in front has ended)
// Where all CTAs of a grid have called this or ended, a grid of launch_dependent() behind it may start. It says nothing
// of memory.
PTX_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the grids in front have ended and all that they wrote can be seen.
PTX_DEVICE void wait_for_grids() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- arithmetic
PTX_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PTX_DEVICE float tanh_approx(float x) {  // relative error 2^-11: for values that are rounded to 16 bits afterwards
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PTX_DEVICE float rsqrt(float x) { return rsqrtf(x); }
PTX_DEVICE float reciprocal(float x) {  // relative error 2^-23
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PTX_DEVICE float product(float x, float y) { return __fmul_rn(x, y); }  // rounded by itself: never fused into an fma
PTX_DEVICE int popcount(uint32_t x) { return __popc(x); }
// c + the products of the four signed bytes of a and b
PTX_DEVICE int dot_int8(uint32_t a, uint32_t b, int c) { return __dp4a(static_cast<int>(a), static_cast<int>(b), c); }
// Byte i of the result is byte (selector >> 4 i & 7) of the eight bytes (high, low).
PTX_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}
PTX_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
PTX_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// The products of two pairs of bf16, rounded; subnormal numbers are numbers. (mul.bf16x2 is there from sm_90 on only.)
PTX_DEVICE uint32_t multiply_bf16x2(uint32_t x, uint32_t y) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(0x80008000u));  // + -0 keeps the sign of zero
  return r;
}
PTX_DEVICE float f16_to_float(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

// ---- asynchronous copies (sm_80)
PTX_DEVICE void copy_async_16(uint32_t to, const void* from, int source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(source_bytes) : "memory");
}
PTX_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GroupsInFlight>
PTX_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsInFlight) : "memory");
}

// ---- tensor cores (sm_80)
PTX_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}
PTX_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}
PTX_DEVICE void mma(bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PTX_DEVICE void mma(f16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

PTX_DEVICE uint32_t bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
PTX_DEVICE float from_bits(uint32_t x) {
  float f;
  memcpy(&f, &x, sizeof f);
  return f;
}

PTX_DEVICE uint32_t shared_address(const void* p) { return simt::shared_address(p); }
PTX_DEVICE Vec16 load_global_16(const void* p) { return *simt::aligned<const Vec16>(p); }
PTX_DEVICE Vec16 load_cached_16(const void* p) { return *simt::aligned<const Vec16>(p); }
PTX_DEVICE void store_global_16(void* p, const Vec16& v) { *simt::aligned<Vec16>(p) = v; }
// Atomic to ThreadSanitizer too: plain accesses without a barrier between are races.
PTX_DEVICE uint32_t shared_add(uint32_t* p, uint32_t x) {
  simt::shared_pointer(simt::shared_address(p), sizeof *p);
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
PTX_DEVICE void shared_or(uint32_t* p, uint32_t x) {
  simt::shared_pointer(simt::shared_address(p), sizeof *p);
  __atomic_fetch_or(p, x, __ATOMIC_RELAXED);
}
PTX_DEVICE void red_add(float* p, float x) { simt::atomic_add(p, x); }
PTX_DEVICE uint64_t atomic_add(uint64_t* p, uint64_t x) { return simt::atomic_add(p, x); }
PTX_DEVICE uint64_t atomic_max(uint64_t* p, uint64_t x) { return simt::atomic_max(p, x); }
PTX_DEVICE void red_add(int32_t* p, int32_t x) { simt::atomic_add(p, x); }
constexpr bool kRedByLane = true;
PTX_DEVICE void red_add_warp(float* at, const float (&x)[4]) {
  at += 4 * (threadIdx.x % 32);
  simt::check_alignment(at, 16);
  for (int i = 0; i < 4; ++i) simt::atomic_add(at + i, x[i]);
}

PTX_DEVICE void syncthreads() { simt::barrier_sync(0, 0); }
PTX_DEVICE void barrier_sync(int id, int threads) { simt::barrier_sync(id, threads); }
PTX_DEVICE void barrier_arrive(int id, int threads) { simt::barrier_arrive(id, threads); }
PTX_DEVICE void syncwarp() { simt::syncwarp(kFullMask); }
PTX_DEVICE uint32_t shfl(uint32_t x, int from_lane) { return simt::shfl(kFullMask, x, from_lane); }
PTX_DEVICE uint32_t shfl_xor(uint32_t x, int lane_mask) { return simt::shfl_xor(kFullMask, x, lane_mask); }
PTX_DEVICE uint32_t ballot(bool predicate) { return simt::ballot(kFullMask, predicate); }
PTX_DEVICE uint32_t warp_max(uint32_t x) { return simt::warp_max(kFullMask, x); }
PTX_DEVICE uint32_t warp_min(uint32_t x) { return simt::warp_min(kFullMask, x); }

PTX_DEVICE void launch_dependents() {}
PTX_DEVICE void wait_for_grids() { simt::wait_for_grids(); }

PTX_DEVICE float exp2(float x) { return x < -126.f ? 0.f : ::exp2f(x); }
PTX_DEVICE float tanh_approx(float x) { return ::tanhf(x); }
PTX_DEVICE float rsqrt(float x) { return 1.f / ::sqrtf(x); }
PTX_DEVICE float reciprocal(float x) { return 1.f / x; }
PTX_DEVICE float product(float x, float y) {
  float xy = x * y;
  asm("" : "+x"(xy));  // hidden from a compiler that would fuse it
  return xy;
}
PTX_DEVICE int popcount(uint32_t x) { return __builtin_popcount(x); }
PTX_DEVICE int dot_int8(uint32_t a, uint32_t b, int c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
}
PTX_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return r;
}
PTX_DEVICE uint32_t bf16_bits(float x) {
  const uint32_t u = bits(x);
  if (x != x) return 0x7fff;
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
PTX_DEVICE uint32_t pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
PTX_DEVICE uint32_t pack_f16(float low, float high) { return simt::f16_bits(low) | simt::f16_bits(high) << 16; }
PTX_DEVICE uint32_t multiply_bf16x2(uint32_t x, uint32_t y) {
  const auto product = [](uint32_t a, uint32_t b) {  // exact in double; in float too, unless it is subnormal
    const double exact = static_cast<double>(from_bits(a << 16)) * static_cast<double>(from_bits(b << 16));
    if (!(::fabs(exact) < 0x1p-126)) return bf16_bits(static_cast<float>(exact));
    return bf16_bits(static_cast<float>(::copysign(::nearbyint(exact * 0x1p133) * 0x1p-133, exact)));
  };
  return product(x & 0xffffu, y & 0xffffu) | product(x >> 16, y >> 16) << 16;
}
PTX_DEVICE float f16_to_float(uint16_t x) { return simt::f16_value(x); }

PTX_DEVICE void copy_async_16(uint32_t to, const void* from, int source_bytes) {
  simt::copy_async_16(to, from, source_bytes);
}
PTX_DEVICE void copy_commit() { simt::copy_commit(); }
template <int GroupsInFlight>
PTX_DEVICE void copy_wait() {
  simt::copy_wait(GroupsInFlight);
}

PTX_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address) { simt::ldmatrix_x4(r, row_address, false); }
PTX_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row_address) { simt::ldmatrix_x4(r, row_address, true); }
PTX_DEVICE void mma(bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::mma_m16n8k16(d, a, b0, b1, simt::Half::bf16);
}
PTX_DEVICE void mma(f16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::mma_m16n8k16(d, a, b0, b1, simt::Half::f16);
}

#endif

// red_add_warp(at, x) adds the four floats of each lane to 128 sums in memory, aligned to 16 bytes, that are kept in
// the order which the target adds to in whole lines. sm_90 adds 16 bytes of a lane at once, so they are neighbours;
// before, the lanes' first floats are neighbours, then their second ones. read_sums() gives what was added for the
// lanes 4 quad + j, from 64 bytes.
PTX_DEVICE void read_sums(const float* at, int quad, float (&x)[4][4]) {
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    const Vec16 sums = load_cached_16(at + (kRedByLane ? 16 * quad + 4 * v : 32 * v + 4 * quad));
#pragma unroll
    for (int e = 0; e < 4; ++e) (kRedByLane ? x[v][e] : x[e][v]) = from_bits(sums.x[e]);
  }
}

PTX_DEVICE float shfl_xor(float x, int lane_mask) { return from_bits(shfl_xor(bits(x), lane_mask)); }
PTX_DEVICE float shfl(float x, int from_lane) { return from_bits(shfl(bits(x), from_lane)); }

}  // namespace ptx
}  // namespace llmcore
