// Known answers: every wrapper of csrc/cuda/ptx.cuh by itself, on inputs whose results are written down or follow from
// the PTX ISA by another route than the emulator's. The same list runs on a GPU (gpu.cpp), which is how the emulator's
// idea of an instruction is held against silicon.
#include <cmath>
#include <iterator>

#include "memory.h"

namespace programs {
namespace {

using llmcore::bf16;
using llmcore::f16;
namespace ptx = llmcore::ptx;

// All kernels here: one CTA, words in, words out.
struct Words {
  const uint32_t* in;
  uint32_t* out;
};
using Kernel = void (*)(Words);
constexpr int kShared = 4096;

// Bit for bit.
Outcome run(Kernel kernel, int threads, const std::vector<uint32_t>& in, const std::vector<uint32_t>& expected) {
  Array<uint32_t> inputs(in.size() + 1), out(expected.size());
  for (size_t i = 0; i < in.size(); ++i) inputs[i] = in[i];
  return compare(
      finished(llmcore::cuda::launch(kernel, {}, threads, kShared, kDevice, Words{inputs.data(), out.data()})), out,
      expected);
}

// As floats, within a relative error.
Outcome run(Kernel kernel, int threads, const std::vector<float>& in, const std::vector<float>& expected,
            double tolerance) {
  Array<float> inputs(in.size() + 1), out(expected.size());
  for (size_t i = 0; i < in.size(); ++i) inputs[i] = in[i];
  const Words words{reinterpret_cast<const uint32_t*>(inputs.data()), reinterpret_cast<uint32_t*>(out.data())};
  return compare(finished(llmcore::cuda::launch(kernel, {}, threads, kShared, kDevice, words)), out, expected,
                 tolerance);
}

std::vector<uint32_t> words_of(const std::vector<float>& values) {
  std::vector<uint32_t> words;
  for (float x : values) words.push_back(word(x));
  return words;
}

// ---- exchange between lanes
// ------------------------------------------------------------------------------------------

__global__ void shfl_kernel(Words w) {  // from lane 5 * l mod 32, and from a lane beyond 31, which wraps
  const int lane = threadIdx.x;
  w.out[lane] = ptx::shfl(w.in[lane], 5 * lane % 32);
  w.out[32 + lane] = ptx::shfl(w.in[lane], lane + 33);
}
Outcome shfl() {
  std::vector<uint32_t> in, expected(64);
  for (uint32_t l = 0; l < 32; ++l) in.push_back(1000 + l * l);
  for (uint32_t l = 0; l < 32; ++l) expected[l] = in[5 * l % 32], expected[32 + l] = in[(l + 1) % 32];
  return run(shfl_kernel, 32, in, expected);
}

__global__ void shfl_xor_kernel(Words w) {
  uint32_t x = w.in[threadIdx.x];
  for (int mask = 1; mask < 32; mask *= 2) {
    const uint32_t other = ptx::shfl_xor(x, mask);
    x = threadIdx.x & mask ? 3 * x + other : 3 * other + x;  // the order of the lanes shows in the result
  }
  w.out[threadIdx.x] = x;
}
Outcome shfl_xor() {
  std::vector<uint32_t> in, x;
  for (uint32_t l = 0; l < 32; ++l) in.push_back(l + 1);
  x = in;
  for (uint32_t mask = 1; mask < 32; mask *= 2) {
    const std::vector<uint32_t> before = x;
    for (uint32_t l = 0; l < 32; ++l) x[l] = 3 * before[l | mask] + before[l & ~mask];
  }
  return run(shfl_xor_kernel, 32, in, x);
}

__global__ void ballot_kernel(Words w) { w.out[threadIdx.x] = ptx::ballot(w.in[threadIdx.x] % 3 == 0); }
Outcome ballot() {
  std::vector<uint32_t> in;
  for (uint32_t l = 0; l < 64; ++l) in.push_back(l);
  std::vector<uint32_t> expected(64, 0x49249249u);  // lanes 0, 3, 6, ... of warp 0
  for (int l = 32; l < 64; ++l) expected[l] = 0x92492492u;
  return run(ballot_kernel, 64, in, expected);
}

// ---- atomic operations on shared memory
// ---------------------------------------------------------------------------

// Thread t adds 1 to counter t % 4 and ticks off the number that it found there; each number is found once.
__global__ void shared_atomics_kernel(Words w) {
  PTX_SHARED_MEMORY(memory);
  uint32_t* counters = reinterpret_cast<uint32_t*>(memory);
  const uint32_t thread = threadIdx.x;
  if (thread < 5) counters[thread] = w.in[thread];
  ptx::syncthreads();
  const uint32_t before = ptx::shared_add(&counters[thread % 4], 1);
  ptx::shared_or(&counters[4], 1u << thread % 32 / 2 * 2);
  w.out[thread % 4 * 16 + (before - w.in[thread % 4]) % 16] = before;
  ptx::syncthreads();
  if (thread < 5) w.out[64 + thread] = counters[thread];
}
Outcome shared_atomics() {
  const std::vector<uint32_t> in = {5, 100, 0xfffffff8u, 0, 0x80000000u};  // one wraps around
  std::vector<uint32_t> expected;
  for (uint32_t counter = 0; counter < 4; ++counter)
    for (uint32_t i = 0; i < 16; ++i) expected.push_back(in[counter] + i);
  for (uint32_t counter = 0; counter < 4; ++counter) expected.push_back(in[counter] + 16);
  expected.push_back(0xd5555555u);
  return run(shared_atomics_kernel, 64, in, expected);
}

__global__ void warp_extremes_kernel(Words w) {
  w.out[threadIdx.x] = ptx::warp_max(w.in[threadIdx.x]);
  w.out[64 + threadIdx.x] = ptx::warp_min(w.in[threadIdx.x]);
}
Outcome warp_extremes() {  // as unsigned numbers
  std::vector<uint32_t> in(64, 0x80000001u), expected(128, 0x80000001u);
  in[5] = 0xfffffff0u, in[30] = 7, in[33] = 0x7fffffffu, in[63] = 0x80000002u;
  for (int l = 0; l < 32; ++l)
    expected[l] = in[5], expected[32 + l] = in[63], expected[64 + l] = in[30], expected[96 + l] = in[33];
  return run(warp_extremes_kernel, 64, in, expected);
}

__global__ void popcount_kernel(Words w) {
  w.out[threadIdx.x] = static_cast<uint32_t>(ptx::popcount(w.in[threadIdx.x]));
}
Outcome popcount() {
  std::vector<uint32_t> in, expected;
  for (uint32_t l = 0; l < 32; ++l) in.push_back(~0u >> l & ~2u), expected.push_back(l < 31 ? 31 - l : 1);
  return run(popcount_kernel, 32, in, expected);
}

__global__ void dot_int8_kernel(Words w) {
  const uint32_t* in = w.in + 3 * threadIdx.x;
  w.out[threadIdx.x] = static_cast<uint32_t>(ptx::dot_int8(in[0], in[1], static_cast<int>(in[2])));
}
Outcome dot_int8() {
  std::vector<uint32_t> in, expected;
  const auto add = [&](uint32_t a, uint32_t b, uint32_t c, int32_t sum) {
    in.insert(in.end(), {a, b, c}), expected.push_back(static_cast<uint32_t>(sum));
  };
  add(0x01020304u, 0x01010101u, 5u, 15);            // 1 + 2 + 3 + 4 + 5
  add(0xff000000u, 0x02000000u, 0u, -2);            // bytes are signed
  add(0x80808080u, 0x80808080u, 0u, 65536);         // -128 squared, four times
  add(0x7f7f7f7fu, 0x80808080u, 1u, -65023);        // 127 times -128, four times, and 1
  add(0x0000000au, 0x0000000bu, 0xfffffff6u, 100);  // 110 - 10: byte meets byte of its own place
  for (uint32_t l = 5; l < 32; ++l) add(l, 3u, l, static_cast<int32_t>(4 * l));
  return run(dot_int8_kernel, 32, in, expected);
}

// ---- barriers
// --------------------------------------------------------------------------------------------------------

// Warp 0 produces, warp 1 consumes, handing one buffer back and forth by barriers 1 (full) and 2 (empty).
__global__ void named_barriers_kernel(Words w) {
  PTX_SHARED_MEMORY(memory);
  uint32_t* buffer = reinterpret_cast<uint32_t*>(memory);
  const int lane = threadIdx.x % 32;
  for (int round = 0; round < 4; ++round)
    if (threadIdx.x < 32) {
      if (round > 0) ptx::barrier_sync(2, 64);
      buffer[lane] = w.in[lane] + round;
      ptx::barrier_arrive(1, 64);
    } else {
      ptx::barrier_sync(1, 64);
      w.out[round * 32 + lane] = buffer[31 - lane];
      if (round < 3) ptx::barrier_arrive(2, 64);
    }
}
Outcome named_barriers() {
  std::vector<uint32_t> in, expected;
  for (uint32_t l = 0; l < 32; ++l) in.push_back(7 * l);
  for (uint32_t round = 0; round < 4; ++round)
    for (uint32_t l = 0; l < 32; ++l) expected.push_back(7 * (31 - l) + round);
  return run(named_barriers_kernel, 64, in, expected);
}

__global__ void syncwarp_kernel(Words w) {
  PTX_SHARED_MEMORY(memory);
  uint32_t* buffer = reinterpret_cast<uint32_t*>(memory) + threadIdx.x / 32 * 32;
  buffer[threadIdx.x % 32] = w.in[threadIdx.x];
  ptx::syncwarp();
  w.out[threadIdx.x] = buffer[(threadIdx.x + 1) % 32];
}
Outcome syncwarp() {
  std::vector<uint32_t> in, expected;
  for (uint32_t i = 0; i < 64; ++i) in.push_back(i), expected.push_back(i / 32 * 32 + (i + 1) % 32);
  return run(syncwarp_kernel, 64, in, expected);
}

// ---- copies and 16-byte accesses
// --------------------------------------------------------------------------------------

// Thread i copies i bytes of 16; the rest is zero. Two groups, waited for one after the other.
__global__ void copy_async_kernel(Words w) {
  PTX_SHARED_MEMORY(memory);
  const int i = threadIdx.x;
  if (i < 17) ptx::copy_async_16(ptx::shared_address(memory) + 16 * i, w.in + 4 * i, i);
  ptx::copy_commit();
  if (i < 17) ptx::copy_async_16(ptx::shared_address(memory) + 16 * (17 + i), w.in + 4 * i, 16 - i);
  ptx::copy_commit();
  const uint32_t* words = reinterpret_cast<const uint32_t*>(memory);
  ptx::copy_wait<1>();
  if (i < 17)
    for (int j = 0; j < 4; ++j) w.out[4 * i + j] = words[4 * i + j];
  ptx::copy_wait<0>();
  ptx::syncthreads();
  if (i < 17)
    for (int j = 0; j < 4; ++j) w.out[4 * (17 + i) + j] = words[4 * (33 - i) + j];  // what another thread copied
}
Outcome copy_async() {
  std::vector<uint32_t> in, expected(136);
  for (uint32_t i = 0; i < 68; ++i) in.push_back(0x01020304u * (i % 60 + 1));
  const auto copied = [&](uint32_t* to, int from, int bytes) { memcpy(to, &in[4 * from], bytes); };
  for (int i = 0; i < 17; ++i) copied(&expected[4 * i], i, i), copied(&expected[4 * (17 + i)], 16 - i, i);
  return run(copy_async_kernel, 32, in, expected);
}

template <bool Cached>
__global__ void global_16_kernel(Words w) {
  const uint32_t* from = w.in + 4 * threadIdx.x;
  ptx::Vec16 v = Cached ? ptx::load_cached_16(from) : ptx::load_global_16(from);
  const uint32_t first = v.x[0];
  v.x[0] = v.x[3];
  v.x[3] = first;
  ptx::store_global_16(w.out + 4 * (31 - threadIdx.x), v);
}
template <bool Cached>
Outcome global_16() {
  std::vector<uint32_t> in, expected(128);
  for (uint32_t i = 0; i < 128; ++i) in.push_back(i * i);
  for (int t = 0; t < 32; ++t)
    for (int j = 0; j < 4; ++j) expected[4 * (31 - t) + j] = in[4 * t + (j == 0 ? 3 : j == 3 ? 0 : j)];
  return run(global_16_kernel<Cached>, 32, in, expected);
}

__global__ void red_add_kernel(Words w) {  // words 0 to 3, which one thread zeroes first
  float* out = reinterpret_cast<float*>(w.out);
  if (threadIdx.x < 4) out[threadIdx.x] = 0;
  ptx::syncthreads();
  ptx::red_add(out + threadIdx.x % 4, static_cast<float>(threadIdx.x));
}
Outcome red_add() { return run(red_add_kernel, 64, {}, words_of({480.f, 496.f, 512.f, 528.f})); }

// ---- between grids
// ---------------------------------------------------------------------------------------------------

__global__ void first_grid_kernel(Words w) {
  ptx::launch_dependents();
  w.out[threadIdx.x] = w.in[threadIdx.x] + 1;
}
__global__ void second_grid_kernel(Words w) {  // adds to what the first has written
  ptx::wait_for_grids();
  w.out[threadIdx.x] += w.in[threadIdx.x];
}
Outcome dependent_launch() {
  constexpr int kWords = 64;
  Array<uint32_t> in(kWords), out(kWords);
  std::vector<uint32_t> expected;
  for (uint32_t i = 0; i < kWords; ++i) in[i] = i * i, expected.push_back(2 * i * i + 1);
  llmcore::cuda::Device device{};
  llmcore::cuda::Status status = llmcore::cuda::describe(0, device);
  const Words words{in.data(), out.data()};
  if (!status) status = llmcore::cuda::launch(first_grid_kernel, {}, kWords, 0, device, words);
  if (!status) status = llmcore::cuda::launch_dependent(second_grid_kernel, {}, kWords, 0, device, words);
  return compare(finished(status), out, expected);
}

// Two 64-bit numbers, which thread 0 zeroes first: a sum whose carry crosses the word, and the largest by the high
// word. What each thread finds before its addition, for threads in any order, sums to a known number too.
__global__ void atomics_kernel(Words w) {
  uint64_t* out = reinterpret_cast<uint64_t*>(w.out);
  if (threadIdx.x < 3) out[threadIdx.x] = 0;
  ptx::syncthreads();
  const uint64_t before = ptx::atomic_add(out, uint64_t{1} << 31);
  ptx::atomic_add(out + 2, before >> 31);
  const uint64_t high = threadIdx.x * 7 % 32;
  ptx::atomic_max(out + 1, high << 32 | threadIdx.x);
}
Outcome atomics() {  // 32 * 2^31; thread 9 has the high word 31; 0 + 1 + ... + 31
  return run(atomics_kernel, 32, {}, std::vector<uint32_t>{0, 16, 9, 31, 496, 0});
}

__global__ void red_add_int_kernel(Words w) {  // in shared memory, then in global memory
  PTX_SHARED_MEMORY(memory);
  int32_t* sums = reinterpret_cast<int32_t*>(memory);
  int32_t* out = reinterpret_cast<int32_t*>(w.out);
  if (threadIdx.x < 4) sums[threadIdx.x] = out[threadIdx.x] = 0;
  ptx::syncthreads();
  ptx::red_add(sums + threadIdx.x % 4, static_cast<int32_t>(threadIdx.x) - 40);
  ptx::syncthreads();
  ptx::red_add(out + threadIdx.x % 4, sums[threadIdx.x % 4]);
}
Outcome red_add_int() {
  std::vector<uint32_t> expected;
  for (int i = 0; i < 4; ++i) expected.push_back(static_cast<uint32_t>(16 * (480 + 16 * i - 640)));
  return run(red_add_int_kernel, 64, {}, expected);
}

// Two warps add to the same sums, which lie in an order of the target's own.
__global__ void red_add_warp_kernel(Words w) {
  float *sums = reinterpret_cast<float*>(w.out), x[4], quad[4][4];
  for (int i = threadIdx.x; i < 128; i += 64) sums[i] = 0;
  ptx::syncthreads();
  for (int i = 0; i < 4; ++i) x[i] = static_cast<float>(threadIdx.x * 4 + i);
  ptx::red_add_warp(sums, x);
  ptx::syncthreads();
  if (threadIdx.x < 8) ptx::read_sums(sums, threadIdx.x, quad);
  ptx::syncthreads();
  if (threadIdx.x < 8)
    for (int i = 0; i < 16; ++i) sums[16 * threadIdx.x + i] = quad[i / 4][i % 4];
}
Outcome red_add_warp() {
  std::vector<float> expected;
  for (int i = 0; i < 128; ++i) expected.push_back(static_cast<float>(i + (i + 128)));
  return run(red_add_warp_kernel, 64, {}, words_of(expected));
}

// ---- tensor cores
// -----------------------------------------------------------------------------------------------------

// 32 rows of 8 elements; element (row, column) is 8 * row + column. Rows are given in the order 5 * l mod 32.
template <bool Transposed>
__global__ void ldmatrix_kernel(Words w) {
  PTX_SHARED_MEMORY(memory);
  uint16_t* elements = reinterpret_cast<uint16_t*>(memory);
  for (int i = 0; i < 8; ++i) elements[threadIdx.x * 8 + i] = static_cast<uint16_t>(threadIdx.x * 8 + i);
  ptx::syncthreads();
  uint32_t r[4];
  const uint32_t row = ptx::shared_address(memory) + 5 * threadIdx.x % 32 * 16;
  if (Transposed)
    ptx::ldmatrix_x4_trans(r, row);
  else
    ptx::ldmatrix_x4(r, row);
  for (int i = 0; i < 4; ++i) w.out[threadIdx.x * 4 + i] = r[i];
}
template <bool Transposed>
Outcome ldmatrix() {
  std::vector<uint32_t> expected;
  for (uint32_t lane = 0; lane < 32; ++lane)
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
      uint32_t halves[2];
      for (uint32_t half = 0; half < 2; ++half) {
        uint32_t row = lane / 4, column = lane % 4 * 2 + half;
        if (Transposed) std::swap(row, column);
        halves[half] = 5 * (8 * matrix + row) % 32 * 8 + column;
      }
      expected.push_back(halves[0] | halves[1] << 16);
    }
  return run(ldmatrix_kernel<Transposed>, 32, {}, expected);
}

// Each lane picks its fragments by the table at the head of ptx.cuh from a (16, 16), b (16, 8), c (16, 8), stored as
// words that hold small integers, and puts its four results where the table says.
template <class T>
__global__ void mma_kernel(Words w) {
  const int group = threadIdx.x / 4, pair = threadIdx.x % 4 * 2;
  const uint32_t *a = w.in, *b = a + 256, *c = b + 128;
  const auto two = [](uint32_t low, uint32_t high) { return low | high << 16; };
  uint32_t fragment[4], columns[2];
  for (int i = 0; i < 4; ++i) {
    const uint32_t* at = a + (group + i % 2 * 8) * 16 + pair + i / 2 * 8;
    fragment[i] = two(at[0], at[1]);
  }
  for (int i = 0; i < 2; ++i) columns[i] = two(b[(pair + 8 * i) * 8 + group], b[(pair + 8 * i + 1) * 8 + group]);
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = ptx::from_bits(c[(group + i / 2 * 8) * 8 + pair + i % 2]);
  ptx::mma(T{}, d, fragment, columns[0], columns[1]);
  for (int i = 0; i < 4; ++i) w.out[(group + i / 2 * 8) * 8 + pair + i % 2] = ptx::bits(d[i]);
}
template <class T>
Outcome mma() {
  SmallIntegers integers;
  // the 16 bits of -4 to 4: bf16 is the upper half of float32; float16 is written down
  const uint32_t halves[] = {0xc400, 0xc200, 0xc000, 0xbc00, 0, 0x3c00, 0x4000, 0x4200, 0x4400};
  const auto element = [&](int x) {
    return std::is_same_v<T, bf16> ? word(static_cast<float>(x)) >> 16 : halves[x + 4];
  };
  int a[16][16], b[16][8];
  std::vector<uint32_t> in, expected;
  for (auto& row : a)
    for (int& x : row) in.push_back(element(x = integers.next()));
  for (auto& row : b)
    for (int& x : row) in.push_back(element(x = integers.next()));
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      int sum = 100 * row + column;
      in.push_back(word(static_cast<float>(sum)));
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      expected.push_back(word(static_cast<float>(sum)));
    }
  return run(mma_kernel<T>, 32, in, expected);
}

// ---- conversions: (float32 bits, 16-bit result)
// ----------------------------------------------------------------------

struct Rounding {
  uint32_t from, to;
};
// Ties to even, a carry into the exponent, the largest finite, overflow, subnormals, signed zero, infinity, NaN.
constexpr Rounding kToBf16[] = {{0x3f800000, 0x3f80}, {0x3f808000, 0x3f80}, {0x3f818000, 0x3f82}, {0x3f808001, 0x3f81},
                                {0x3fffffff, 0x4000}, {0x7f7f0000, 0x7f7f}, {0x7f7fffff, 0x7f80}, {0x00000001, 0x0000},
                                {0x00018000, 0x0002}, {0x807f8000, 0x8080}, {0x80000000, 0x8000}, {0x7f800000, 0x7f80},
                                {0xff800000, 0xff80}, {0x7fc00000, 0x7fff}};
constexpr Rounding kToF16[] = {{0x3f800000, 0x3c00}, {0x3f801000, 0x3c00}, {0x3f803000, 0x3c02}, {0x3f801001, 0x3c01},
                               {0x3fffffff, 0x4000}, {0x477fe000, 0x7bff}, {0x477fefff, 0x7bff}, {0x477ff000, 0x7c00},
                               {0x38800000, 0x0400}, {0x387fffff, 0x0400}, {0x33800000, 0x0001}, {0x33000000, 0x0000},
                               {0x33000001, 0x0001}, {0xb3c00000, 0x8002}, {0x80000000, 0x8000}, {0x7f800000, 0x7c00},
                               {0xff800000, 0xfc00}, {0x7fc00000, 0x7fff}};

template <bool ToBf16>
__global__ void pack_kernel(Words w) {  // each value in the low half, its successor in the high one
  const float low = ptx::from_bits(w.in[threadIdx.x]), high = ptx::from_bits(w.in[threadIdx.x + 1]);
  w.out[threadIdx.x] = ToBf16 ? ptx::pack_bf16(low, high) : ptx::pack_f16(low, high);
}
template <bool ToBf16, size_t N>
Outcome pack(const Rounding (&table)[N]) {
  std::vector<uint32_t> in, expected;
  for (size_t i = 0; i < N; ++i) {
    in.push_back(table[i].from);
    expected.push_back(table[i].to | table[(i + 1) % N].to << 16);
  }
  in.push_back(table[0].from);
  return run(pack_kernel<ToBf16>, static_cast<int>(N), in, expected);
}
Outcome pack_bf16() { return pack<true>(kToBf16); }
Outcome pack_f16() { return pack<false>(kToF16); }

__global__ void multiply_bf16x2_kernel(Words w) {
  const uint32_t *x = w.in, *y = w.in + blockDim.x;
  w.out[threadIdx.x] = ptx::multiply_bf16x2(x[threadIdx.x], y[threadIdx.x]);
}
Outcome multiply_bf16x2() {
  struct Product {
    uint32_t x, y, expected;
  };
  constexpr Product kProducts[] = {
      {0x3f80, 0xc000, 0xc000},                            // 1 times -2
      {0x3f81, 0x3f81, 0x3f82},                            // 1 + 2^-6 + 2^-14
      {0x3fc0, 0x3f83, 0x3fc4},                            // ties, to even
      {0x3fc0, 0x3f81, 0x3fc2}, {0x0001, 0x7780, 0x3500},  // subnormal numbers times 2^112, and a normal one
      {0x8070, 0x7780, 0xb860}, {0x07e0, 0x7780, 0x3fe0}, {0x0001, 0x3f00, 0x0000},  // subnormal results, rounded
      {0x0003, 0x3f00, 0x0002}, {0x8001, 0x3f40, 0x8001}, {0x0080, 0x3f00, 0x0040},
      {0x00ff, 0x3f00, 0x0080}, {0x0000, 0x7780, 0x0000},                            // zero keeps its sign
      {0x8000, 0x7780, 0x8000}, {0x8000, 0x8000, 0x0000}, {0x7f7f, 0x3f81, 0x7f80},  // overflow, infinity, NaN
      {0xff80, 0x3f80, 0xff80}, {0x7f80, 0x0000, 0x7fff},
  };
  constexpr size_t kCount = std::size(kProducts);
  std::vector<uint32_t> x, y, expected;
  for (size_t i = 0; i < kCount; ++i) {  // each in the low half, its successor in the high one
    const Product &low = kProducts[i], &high = kProducts[(i + 1) % kCount];
    x.push_back(low.x | high.x << 16);
    y.push_back(low.y | high.y << 16);
    expected.push_back(low.expected | high.expected << 16);
  }
  x.insert(x.end(), y.begin(), y.end());
  return run(multiply_bf16x2_kernel, static_cast<int>(kCount), x, expected);
}

__global__ void f16_to_float_kernel(Words w) {
  w.out[threadIdx.x] = ptx::bits(ptx::f16_to_float(static_cast<uint16_t>(w.in[threadIdx.x])));
}
Outcome f16_to_float() {
  const std::vector<uint32_t> in = {0x3c00, 0xc000, 0x7bff, 0x0400, 0x0001, 0x8003, 0x03ff, 0x8000, 0x7c00, 0xfc00};
  return run(
      f16_to_float_kernel, static_cast<int>(in.size()), in,
      words_of({1.f, -2.f, 65504.f, 0x1p-14f, 0x1p-24f, -3 * 0x1p-24f, 1023 * 0x1p-24f, -0.f, INFINITY, -INFINITY}));
}

// Selector nibbles 0 to 3 pick from the low word, 4 to 7 from the high one.
__global__ void permute_bytes_kernel(Words w) {
  w.out[threadIdx.x] = ptx::permute_bytes(0x33221100, 0x77665544, w.in[threadIdx.x]);
}
Outcome permute_bytes() {
  return run(permute_bytes_kernel, 4, {0x3210, 0x7654, 0x0246, 0x7153},
             {0x33221100u, 0x77665544u, 0x00224466u, 0x77115533u});
}

// x * x - round(x * x) is what an fma would leave; the product by itself leaves nothing.
__global__ void product_kernel(Words w) {
  const float x = ptx::from_bits(w.in[threadIdx.x]);
  const float rounded = ptx::from_bits(w.in[4 + threadIdx.x]);
  w.out[threadIdx.x] = ptx::bits(ptx::product(x, x) - rounded);
}
Outcome product() {
  std::vector<float> in = {1.0000001f, 3.3333333f, 1e-3f, 12345.678f};
  for (int i = 0; i < 4; ++i) {
    const volatile float rounded = in[i] * in[i];
    in.push_back(static_cast<float>(rounded));
  }
  return run(product_kernel, 4, words_of(in), std::vector<uint32_t>(4, 0));
}

// ---- approximate arithmetic: within what the PTX ISA promises
// --------------------------------------------------------

template <float (*F)(float)>
__global__ void arithmetic_kernel(Words w) {
  w.out[threadIdx.x] = ptx::bits(F(ptx::from_bits(w.in[threadIdx.x])));
}
const std::vector<float> kArguments = {0.f,     1.f,  -1.f,    0.3f,     -0.7f,     5.25f,  -13.9f,
                                       0x1p-9f, 30.f, -125.5f, INFINITY, -INFINITY, 1e-30f, NAN};

PTX_DEVICE float exp2_wrapper(float x) { return ptx::exp2(x); }
PTX_DEVICE float tanh_wrapper(float x) { return ptx::tanh_approx(x); }
PTX_DEVICE float rsqrt_wrapper(float x) { return ptx::rsqrt(x); }
PTX_DEVICE float reciprocal_wrapper(float x) { return ptx::reciprocal(x); }

template <float (*F)(float), double (*Exact)(double)>
Outcome arithmetic(std::vector<float> in, double tolerance) {
  std::vector<float> expected;
  for (float x : in) expected.push_back(static_cast<float>(Exact(x)));
  return run(arithmetic_kernel<F>, static_cast<int>(in.size()), in, expected, tolerance);
}
double exact_rsqrt(double x) { return 1 / std::sqrt(x); }
double exact_reciprocal(double x) { return 1 / x; }

Outcome exp2() {
  std::vector<float> in = kArguments;
  in.push_back(-200.f);  // results below 2^-126 are flushed to zero
  return arithmetic<exp2_wrapper, std::exp2>(in, 0x1p-22);
}
Outcome tanh_approx() { return arithmetic<tanh_wrapper, std::tanh>(kArguments, 0x1p-10); }
Outcome rsqrt() {
  return arithmetic<rsqrt_wrapper, exact_rsqrt>({1.f, 2.f, 0.1f, 1e-30f, 1e30f, 0.f, INFINITY, -1.f, NAN}, 0x1p-21);
}

Outcome reciprocal() {
  return arithmetic<reciprocal_wrapper, exact_reciprocal>(
      {1.f, -3.f, 0.1f, 1e-30f, 1e30f, 0.f, -0.f, INFINITY, -INFINITY, NAN}, 0x1p-22);
}

}  // namespace

std::vector<Correct> known_answers() {
  return {
      {"shfl", shfl},
      {"shfl_xor", shfl_xor},
      {"ballot", ballot},
      {"shared_atomics", shared_atomics},
      {"named_barriers", named_barriers},
      {"syncwarp", syncwarp},
      {"copy_async", copy_async},
      {"global_16", global_16<false>},
      {"cached_16", global_16<true>},
      {"permute_bytes", permute_bytes},
      {"product", product},
      {"red_add", red_add},
      {"dependent_launch", dependent_launch},
      {"atomics", atomics},
      {"red_add_int", red_add_int},
      {"warp_extremes", warp_extremes},
      {"popcount", popcount},
      {"dot_int8", dot_int8},
      {"red_add_warp", red_add_warp},
      {"ldmatrix", ldmatrix<false>},
      {"ldmatrix_trans", ldmatrix<true>},
      {"mma_bf16", mma<bf16>},
      {"mma_f16", mma<f16>},
      {"pack_bf16", pack_bf16},
      {"pack_f16", pack_f16},
      {"multiply_bf16x2", multiply_bf16x2},
      {"f16_to_float", f16_to_float},
      {"exp2", exp2},
      {"tanh_approx", tanh_approx},
      {"rsqrt", rsqrt},
      {"reciprocal", reciprocal},
  };
}

}  // namespace programs
