// A SIMT machine on the CPU: CUDA kernels compiled by a host compiler run on it, one fiber for each CUDA thread, one
// CTA after the other. csrc/cuda/ptx.cuh calls the functions below where nvcc would see inline PTX; tests choose the
// schedule and when asynchronous copies happen, within what the PTX ISA allows.
//
// Whatever a GPU would not promise is made to hurt: shared memory starts as NaN, the destination of a copy in flight is
// NaN, lanes that disagree on a collective operation, barriers that never fill and addresses outside shared memory are
// errors that name the thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned count() const { return x * y * z; }
};

// ---- what tests choose ---------------------------------------------------------------------------------------------

enum class Schedule {
  round_robin,  // a warp runs until it blocks, then the next
  random,       // any ready lane of any warp, pre-empted at random after a collective
  priorities,   // random fixed priorities, now and then drawn again: some warps run far ahead of others
};
enum class Copies {
  late,    // an asynchronous copy happens when it must have: at the wait (finds missing waits and barriers)
  early,   // when it is issued (finds buffers that are still being read)
  random,  // each at random one of the two
};
Schedule schedule_named(const std::string& name);  // throws std::invalid_argument
Copies copies_named(const std::string& name);
struct Options {
  Schedule schedule = Schedule::round_robin;
  Copies copies = Copies::late;
  uint64_t seed = 1;
  size_t shared_bytes = 227 * 1024;  // that a CTA may have, as on an sm_90; an sm_86 has 99 KiB
};
Options& options();

// What happened since the last reset, for tests and for lints on access patterns.
struct Counters {
  uint64_t threads = 0, switches = 0, collectives = 0, barriers = 0, mma = 0, copies = 0;
  // ldmatrix reads 8 x 8 matrices of 16-byte rows; without bank conflicts each takes one wavefront.
  uint64_t ldmatrix_matrices = 0, ldmatrix_wavefronts = 0;
};
Counters& counters();

// A kernel did what no CUDA program may do; names the CTA, the thread and the operation.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- launching -----------------------------------------------------------------------------------------------------

// Runs body() as every thread of the grid. Throws Error. `dependent`: a GPU may start the grid before the one in front
// of it has ended. The emulator does not, but every thread must call wait_for_grids().
void launch(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body, bool dependent = false);
void wait_for_grids();  // griddepcontrol.wait

// The running thread's coordinates (threadIdx and kin).
const Dim3& thread_index();
const Dim3& block_index();
const Dim3& block_dim();
const Dim3& grid_dim();

// ---- shared memory: 32-bit addresses, as PTX has them --------------------------------------------------------------

uint8_t* shared_memory();                            // of the running CTA
uint32_t shared_address(const void* pointer);        // not 0 for the first byte, as on a GPU
uint8_t* shared_pointer(uint32_t at, size_t bytes);  // checked against the CTA's allocation

// ---- operations of a warp; `mask` names the lanes that take part ---------------------------------------------------

constexpr uint32_t kFullMask = 0xffffffffu;

void syncwarp(uint32_t mask);
uint32_t shfl(uint32_t mask, uint32_t value, unsigned from_lane);      // shfl.sync.idx
uint32_t shfl_xor(uint32_t mask, uint32_t value, unsigned lane_mask);  // shfl.sync.bfly
uint32_t ballot(uint32_t mask, bool predicate);                        // vote.sync.ballot
uint32_t warp_max(uint32_t mask, uint32_t value);                      // redux.sync.max.u32
uint32_t warp_min(uint32_t mask, uint32_t value);                      // redux.sync.min.u32
void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address, bool transposed);
enum class Half { bf16, f16 };
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half type);

// ---- barriers of a CTA (bar.sync id, threads; 0 threads: all) ------------------------------------------------------

void barrier_sync(int id, unsigned threads);
void barrier_arrive(int id, unsigned threads);

// ---- cp.async: 16 bytes from global to shared memory, the bytes beyond `source_bytes` zero -------------------------

void copy_async_16(uint32_t to, const void* from, int source_bytes);
void copy_commit();
void copy_wait(int groups_in_flight);

// ---- global memory -------------------------------------------------------------------------------------------------

void atomic_add(float* at, float value);            // red.global.add.f32
void atomic_add(int32_t* at, int32_t value);        // red.add.s32
uint64_t atomic_add(uint64_t* at, uint64_t value);  // atom.global.add.u64: what was there before
uint64_t atomic_max(uint64_t* at, uint64_t value);  // atom.global.max.u64
void check_alignment(const void* at, size_t bytes);
template <class T>
T* aligned(auto* at) {
  check_alignment(at, sizeof(T));
  return reinterpret_cast<T*>(at);
}

// ---- 16-bit floats -------------------------------------------------------------------------------------------------

uint32_t f16_bits(float value);  // rounded to nearest even
float f16_value(uint16_t bits);

}  // namespace simt
