// Collective operations of a warp. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "ldmatrix".
#include <algorithm>
#include <cmath>
#include <cstring>

#include "machine.h"

namespace simt {

void rendezvous(uint32_t mask, const Operation& operation, void* operand) {
  Thread& self = running();
  Warp& warp = *self.warp;
  ++counters().collectives;
  if (!(mask >> self.lane & 1)) fail("%s: lane %u is not in its own mask %08x", operation.name, self.lane, mask);
  if (mask & ~warp.alive) fail("%s: mask %08x names lanes that have ended or never were", operation.name, mask);
  Rendezvous* meeting = nullptr;
  for (int i = 0; i < warp.num_open && !meeting; ++i)
    if (warp.open[i].mask & mask) meeting = &warp.open[i];
  if (!meeting) {
    if (warp.num_open == Warp::kMaxOpen)
      fail("%s: more than %d disjoint masks at once", operation.name, Warp::kMaxOpen);
    meeting = &warp.open[warp.num_open++];
    meeting->mask = mask;
    meeting->arrived = 0;
    meeting->operation = &operation;
  }
  if (meeting->mask != mask) fail("%s: masks %08x and %08x overlap", operation.name, mask, meeting->mask);
  if (meeting->operation != &operation)
    fail("divergence: lane %u is at %s while others of its warp are at %s", self.lane, operation.name,
         meeting->operation->name);
  meeting->operands[self.lane] = operand;
  meeting->arrived |= 1u << self.lane;
  if (meeting->arrived != mask) {
    block(operation.name, 0);
    return;
  }
  {
    race::Ignore ignore;
    if (operation.perform) operation.perform(meeting->operands, mask);
  }
  *meeting = warp.open[--warp.num_open];
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && lane != self.lane) wake(*warp.lanes[lane]);
  maybe_preempt();
}

void check_not_awaited(const Thread& thread) {
  const Warp& warp = *thread.warp;
  for (int i = 0; i < warp.num_open; ++i)
    if (warp.open[i].mask >> thread.lane & 1)
      fail("the thread has ended, but lanes %08x of its warp wait for it at %s", warp.open[i].arrived,
           warp.open[i].operation->name);
}

void syncwarp(uint32_t mask) {
  static const Operation operation{"syncwarp", [](void* const*, uint32_t) { ++running().warp->syncwarp.round; }};
  void* here = running().warp->syncwarp.now();
  race::release(here);
  rendezvous(mask, operation, nullptr);
  race::acquire(here);
}

// ---- exchange of registers: orders nothing, as in the CUDA model ----------------------------------------------------

namespace {

struct Exchange {
  uint32_t value, result;
  unsigned lane;  // whose value, or which bits of the own lane number to flip
};

template <class SourceLane>  // (lane, operand) -> lane
void exchange(void* const* operands, uint32_t mask, const SourceLane& source_lane) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto* mine = static_cast<Exchange*>(operands[lane]);
    const unsigned source = source_lane(lane, mine->lane) & 31;
    if (mask >> source & 1)
      mine->result = static_cast<Exchange*>(operands[source])->value;
    else
      mine->result = 0x7fffdead;  // undefined on a GPU: a NaN here
  }
}

}  // namespace

uint32_t shfl(uint32_t mask, uint32_t value, unsigned from_lane) {
  static const Operation operation{"shfl.idx", [](void* const* operands, uint32_t lanes) {
                                     exchange(operands, lanes, [](unsigned, unsigned from) { return from; });
                                   }};
  Exchange x{value, value, from_lane};
  rendezvous(mask, operation, &x);
  return x.result;
}

uint32_t shfl_xor(uint32_t mask, uint32_t value, unsigned lane_mask) {
  static const Operation operation{"shfl.bfly", [](void* const* operands, uint32_t lanes) {
                                     exchange(operands, lanes,
                                              [](unsigned lane, unsigned bits) { return lane ^ bits; });
                                   }};
  Exchange x{value, value, lane_mask};
  rendezvous(mask, operation, &x);
  return x.result;
}

uint32_t ballot(uint32_t mask, bool predicate) {
  static const Operation operation{"vote.ballot", [](void* const* operands, uint32_t lanes) {
                                     uint32_t votes = 0;
                                     for (unsigned lane = 0; lane < 32; ++lane)
                                       if (lanes >> lane & 1 && static_cast<Exchange*>(operands[lane])->value)
                                         votes |= 1u << lane;
                                     for (unsigned lane = 0; lane < 32; ++lane)
                                       if (lanes >> lane & 1) static_cast<Exchange*>(operands[lane])->result = votes;
                                   }};
  Exchange x{predicate, 0, 0};
  rendezvous(mask, operation, &x);
  return x.result;
}

namespace {

template <class Better>  // (a, b) -> whether a goes before b
void reduce(void* const* operands, uint32_t mask, const Better& better) {
  const Exchange* best = nullptr;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1)
      if (auto* mine = static_cast<Exchange*>(operands[lane]); !best || better(mine->value, best->value)) best = mine;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) static_cast<Exchange*>(operands[lane])->result = best->value;
}

}  // namespace

uint32_t warp_max(uint32_t mask, uint32_t value) {
  static const Operation operation{"redux.max", [](void* const* operands, uint32_t lanes) {
                                     reduce(operands, lanes, [](uint32_t a, uint32_t b) { return a > b; });
                                   }};
  Exchange x{value, 0, 0};
  rendezvous(mask, operation, &x);
  return x.result;
}

uint32_t warp_min(uint32_t mask, uint32_t value) {
  static const Operation operation{"redux.min", [](void* const* operands, uint32_t lanes) {
                                     reduce(operands, lanes, [](uint32_t a, uint32_t b) { return a < b; });
                                   }};
  Exchange x{value, 0, 0};
  rendezvous(mask, operation, &x);
  return x.result;
}

// ---- ldmatrix.x4: lane i gives the address of row i % 8 of matrix i / 8 ---------------------------------------------

namespace {

struct MatrixRow {
  uint16_t elements[8];
  uint32_t address;
  uint32_t* registers;
};

// Rows of one 8 x 8 matrix in the same 16-byte column of the 128-byte wide banks are read one after the other.
void count_wavefronts(void* const* operands) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    int rows_in[8] = {}, most = 0;
    for (int row = 0; row < 8; ++row) {
      const uint32_t address = static_cast<MatrixRow*>(operands[8 * matrix + row])->address;
      bool seen = false;
      for (int other = 0; other < row; ++other)
        seen |= static_cast<MatrixRow*>(operands[8 * matrix + other])->address == address;
      if (!seen) most = std::max(most, ++rows_in[address / 16 % 8]);
    }
    counters().ldmatrix_wavefronts += most;
    ++counters().ldmatrix_matrices;
  }
}

template <bool Transposed>
void load_matrices(void* const* operands, uint32_t) {
  count_wavefronts(operands);
  const auto element = [&](int matrix, int row, int column) -> uint32_t {
    return static_cast<MatrixRow*>(operands[8 * matrix + row])->elements[column];
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int matrix = 0; matrix < 4; ++matrix) {
      const uint32_t low = Transposed ? element(matrix, pair, group) : element(matrix, group, pair);
      const uint32_t high = Transposed ? element(matrix, pair + 1, group) : element(matrix, group, pair + 1);
      static_cast<MatrixRow*>(operands[lane])->registers[matrix] = low | high << 16;
    }
  }
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address, bool transposed) {
  static const Operation plain{"ldmatrix", load_matrices<false>}, trans{"ldmatrix.trans", load_matrices<true>};
  if (row_address % 16) fail("ldmatrix: the row address %u is not a multiple of 16", row_address);
  MatrixRow row;
  const uint8_t* at = shared_pointer(row_address, 16);
  race::read(at, 16);
  {
    race::Ignore ignore;
    memcpy(row.elements, at, 16);
  }
  row.address = row_address;
  row.registers = r;
  rendezvous(kFullMask, transposed ? trans : plain, &row);
}

// ---- mma.sync.m16n8k16: 16-bit floats in, float32 out ---------------------------------------------------------------

namespace {

float widen(uint32_t bits, Half type) {
  if (type == Half::f16) return f16_value(static_cast<uint16_t>(bits));
  bits <<= 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <Half type>
void multiply(void* const* operands, uint32_t) {
  ++counters().mma;
  float a[16][16], b[8][16];  // b[n][k]
  for (int lane = 0; lane < 32; ++lane) {
    const auto* x = static_cast<Product*>(operands[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half)
        a[group + i % 2 * 8][pair + i / 2 * 8 + half] = widen(x->a[i] >> 16 * half, type);
    for (int i = 0; i < 2; ++i)
      for (int half = 0; half < 2; ++half) b[group][pair + i * 8 + half] = widen(x->b[i] >> 16 * half, type);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* x = static_cast<Product*>(operands[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      const float *row = a[group + i / 2 * 8], *column = b[pair + i % 2];
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      x->d[i] += sum;
    }
  }
}

}  // namespace

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half type) {
  static const Operation bf16{"mma.bf16", multiply<Half::bf16>}, f16{"mma.f16", multiply<Half::f16>};
  Product x{d, a, {b0, b1}};
  rendezvous(kFullMask, type == Half::bf16 ? bf16 : f16, &x);
}

// ---- 16-bit floats -------------------------------------------------------------------------------------------------

float f16_value(uint16_t bits) {
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits >> 15 ? -1.f : 1.f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.f + static_cast<float>(fraction), static_cast<int>(exponent) - 25)
                          : std::ldexp(static_cast<float>(fraction), -24));
}

uint32_t f16_bits(float value) {
  const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7fff;
  const float magnitude = std::fabs(value);
  if (magnitude == 0.f) return sign;
  if (magnitude >= 65520.f) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);              // magnitude = m * 2^exponent, m in [0.5, 1)
  const int ulp = std::max(exponent, -13) - 11;  // exponent of the last bit of a half
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -ulp)));
  // steps counts ulps: subnormals as they are, and a carry into the exponent comes out right by itself
  return sign | (exponent < -13 ? steps : static_cast<uint32_t>(exponent + 13) * 1024 + steps);
}

}  // namespace simt
