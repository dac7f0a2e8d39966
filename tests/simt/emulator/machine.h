// The emulator's own view of a running CTA. Kernels see simt.h only.
#pragma once
#include <memory>
#include <vector>

#include "fiber.h"
#include "race_detector.h"
#include "simt.h"

namespace simt {

struct Warp;
struct Cta;

// A point at which threads meet, for the race detector. Two, used in turn, so that a thread that is already at the next
// meeting does not pass what it did since to one that is still leaving this one.
struct MeetingPoint {
  char places[2] = {};
  unsigned round = 0;
  void* now() { return &places[round & 1]; }
};

struct CopyAsync {
  uint8_t* to;
  const uint8_t* from;
  int source_bytes, group;
};

// The hardware that carries out the copies of one group, as a thread of its own for the race detector: its accesses
// come after the issue of the copy, and before nothing but what follows a wait for the group.
struct CopyEngine {
  static constexpr int kIdle = -1;
  int group;
  void* race_fiber;
};

struct Thread {
  enum class State { ready, blocked, done };
  Fiber fiber;
  void* race_fiber = nullptr;
  State state = State::ready;
  const char* waits_at = "";  // for the deadlock report
  int waits_for = 0;
  bool waited_for_grids = false;
  Dim3 index;
  unsigned linear = 0, lane = 0;
  Warp* warp = nullptr;
  std::vector<CopyAsync> copies;         // issued, not yet done
  int copy_group = 0;                    // the group that copies join until the next commit
  std::vector<CopyEngine> copy_engines;  // only under the race detector
};

// A collective operation of a warp: every lane of the mask deposits its operand, the last one performs it for all.
struct Operation {
  const char* name;
  void (*perform)(void* const* operands, uint32_t mask);
};
struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  const Operation* operation = nullptr;
  void* operands[32];
};

struct Warp {
  unsigned id = 0;
  uint32_t ready = 0, alive = 0;
  Thread* lanes[32] = {};
  uint64_t priority = 0;
  static constexpr int kMaxOpen = 8;
  Rendezvous open[kMaxOpen];  // at most one for each disjoint mask
  int num_open = 0;
  MeetingPoint syncwarp;
};

struct NamedBarrier {
  unsigned expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
  MeetingPoint meeting;
};

struct Cta {
  Dim3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> allocation;
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  NamedBarrier barriers[16];
  unsigned alive = 0, next_warp = 0;
};

Thread& running();  // the thread whose kernel code called the emulator
Cta& running_cta();
uint64_t random_bits();  // repeatable for a seed

// Reports a misuse from the running thread: ends the launch, which throws Error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void block(const char* at, int what);  // the running thread waits until somebody calls wake() on it
void wake(Thread& thread);
void maybe_preempt();  // under Schedule::random now and then lets another thread run

// The race detector tells apart at most this many threads and copy engines of a launch; it has room for 8000 fibers. A
// larger launch goes around: then it takes CTAs that lie that far apart for one, and misses races between them.
constexpr size_t kPlaces = 6000;
size_t take_place();             // one that this launch has not used
void* race_fiber(size_t place);  // null when there is no race detector

void rendezvous(uint32_t mask, const Operation& operation, void* operand);
// At a thread's exit:
void finish_copies(Thread& thread);
void check_not_awaited(const Thread& thread);  // by other lanes of its warp, at a collective operation

}  // namespace simt
