// Which thread runs next, and how a launch begins and ends.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace simt {
namespace {

struct Machine {
  Options options;
  Counters counters;
  Dim3 grid, block;
  bool dependent = false;  // the grid may start before the one in front of it has ended
  const std::function<void()>* body = nullptr;
  Cta* cta = nullptr;
  Thread* current = nullptr;
  Fiber host;  // the flow of control that called launch()
  void* host_race_fiber = nullptr;
  bool failed = false;
  char message[512] = "";
  uint64_t random_state = 1;
  std::vector<void*> race_fibers;  // kept for the next launch
  size_t places_taken = 0;         // by the threads of this launch, and the engines of their copies
  char launched = 0, ended = 0;    // for the race detector: the host's work happens before a CTA's, and the other way
};
thread_local Machine machine;

// The best ready warp under the schedule, or null.
Warp* next_warp(Cta& cta) {
  auto& warps = cta.warps;
  const size_t n = warps.size();
  if (machine.options.schedule == Schedule::priorities) {
    Warp* best = nullptr;
    for (Warp& warp : warps)
      if (warp.ready && (!best || warp.priority > best->priority)) best = &warp;
    if (best && random_bits() % 256 == 0) best->priority = random_bits();
    return best;
  }
  const bool in_turn = machine.options.schedule == Schedule::round_robin;
  const size_t start = in_turn ? cta.next_warp : random_bits() % n;
  for (size_t i = 0; i < n; ++i) {
    const size_t w = (start + i) % n;
    if (!warps[w].ready) continue;
    cta.next_warp = static_cast<unsigned>(w);
    return &warps[w];
  }
  return nullptr;
}

Thread* next_lane(const Warp& warp) {
  uint32_t ready = warp.ready;
  if (machine.options.schedule != Schedule::round_robin)
    for (auto skip = random_bits() % static_cast<unsigned>(__builtin_popcount(ready)); skip > 0; --skip)
      ready &= ready - 1;
  return warp.lanes[__builtin_ctz(ready)];
}

[[noreturn]] void report_deadlock(Cta& cta) {
  std::string text = "deadlock: no thread can go on";
  for (const Warp& warp : cta.warps) {
    uint32_t told = 0;
    for (const Thread* lane : warp.lanes) {  // lanes of a warp may wait at different places
      if (!lane || lane->state != Thread::State::blocked || told >> lane->lane & 1) continue;
      uint32_t together = 0;
      for (const Thread* other : warp.lanes)
        if (other && other->state == Thread::State::blocked && other->waits_at == lane->waits_at &&
            other->waits_for == lane->waits_for)
          together |= 1u << other->lane;
      told |= together;
      char line[160];
      snprintf(line, sizeof line, "; warp %u: lanes %08x wait at %s %d", warp.id, together, lane->waits_at,
               lane->waits_for);
      text += line;
      machine.current = const_cast<Thread*>(lane);
    }
  }
  fail("%s", text.c_str());
}

// The thread to run next; null when the CTA is done.
Thread* pick(Cta& cta) {
  if (Warp* warp = next_warp(cta)) return next_lane(*warp);
  if (cta.alive == 0) return nullptr;
  report_deadlock(cta);
}

// Leaves `self` for whoever is next; null goes back to the host.
void reschedule(Thread& self) {
  Thread* next = pick(*machine.cta);
  machine.current = next;
  if (next == &self) return;
  ++machine.counters.switches;
  race::switch_to(next ? next->race_fiber : machine.host_race_fiber);
  Fiber::switch_from_to(self.fiber, next ? next->fiber : machine.host);
}

void thread_main() {
  race::acquire(&machine.launched);
  (*machine.body)();
  Thread& self = *machine.current;
  finish_copies(self);
  check_not_awaited(self);
  if (machine.dependent && !self.waited_for_grids)
    fail("ended without griddepcontrol.wait, in a grid that may start before the one in front of it has ended");
  race::release(&machine.ended);
  self.state = Thread::State::done;
  self.warp->ready &= ~(1u << self.lane);
  self.warp->alive &= ~(1u << self.lane);
  --machine.cta->alive;
  reschedule(self);
  abort();  // nobody switches to a thread that is done
}

// Fresh shared memory for every CTA, and under the race detector fresh stacks and fibers: recycled ones would order
// CTAs that nothing orders, or report races between them that are none. The next launch, which comes after this one,
// may have them again.
void build(Cta& cta, size_t shared_bytes) {
  const Dim3& block = machine.block;
  const unsigned count = block.count();
  cta.threads.resize(count);
  cta.warps.resize((count + 31) / 32);
  cta.alive = count;
  constexpr size_t kAlign = 1024;
  cta.allocation = std::make_unique<unsigned char[]>(shared_bytes + kAlign);
  cta.shared =
      reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(cta.allocation.get()) + kAlign - 1) / kAlign * kAlign);
  cta.shared_bytes = shared_bytes;
  memset(cta.shared, 0xff, shared_bytes);  // NaN in bf16, fp16 and fp32
  for (size_t w = 0; w < cta.warps.size(); ++w) {
    cta.warps[w].id = static_cast<unsigned>(w);
    cta.warps[w].priority = random_bits();
  }
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = cta.threads[i];
    thread.linear = i;
    thread.lane = i % 32;
    thread.warp = &cta.warps[i / 32];
    thread.index = Dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    thread.warp->lanes[thread.lane] = &thread;
    thread.warp->alive |= 1u << thread.lane;
    thread.warp->ready |= 1u << thread.lane;
    const size_t place = race::on() ? take_place() : i;
    thread.fiber.start(pooled_stack(place), kStackBytes, thread_main);
    thread.race_fiber = race_fiber(place);
  }
}

// The host's next steps happen after all that a thread and its copies did.
void come_after(Thread& thread) {
  if (!race::on()) return;
  for (const CopyEngine& engine : thread.copy_engines) {
    race::switch_to(engine.race_fiber);
    race::switch_and_order(machine.host_race_fiber);
  }
  race::switch_to(thread.race_fiber);
  race::switch_and_order(machine.host_race_fiber);
}

void run_cta(const Dim3& index, size_t shared_bytes) {
  std::unique_ptr<Cta> cta;
  {
    race::Ignore ignore;
    cta = std::make_unique<Cta>();
    cta->index = index;
    machine.cta = cta.get();
    build(*cta, shared_bytes);
  }
  race::release(&machine.launched);
  machine.counters.threads += cta->threads.size();
  machine.failed = false;
  if (Thread* first = pick(*cta)) {
    machine.current = first;
    race::switch_to(first->race_fiber);
    Fiber::switch_from_to(machine.host, first->fiber);
  }
  machine.current = nullptr;
  if (machine.failed)  // threads stopped in their midst; the host must still come after them
    for (Thread& thread : cta->threads) come_after(thread);
  race::Ignore ignore;
  if (!machine.failed)
    for (int id = 0; id < 16; ++id)
      if (cta->barriers[id].arrived) {
        machine.failed = true;
        snprintf(machine.message, sizeof machine.message, "CTA (%u, %u, %u) ended with %u arrivals at barrier %d",
                 index.x, index.y, index.z, cta->barriers[id].arrived, id);
      }
  machine.cta = nullptr;
  cta.reset();
  if (!machine.failed) return;
  race::acquire(&machine.ended);
  throw Error(machine.message);
}

}  // namespace

Schedule schedule_named(const std::string& name) {
  if (name == "round_robin") return Schedule::round_robin;
  if (name == "random") return Schedule::random;
  if (name == "priorities") return Schedule::priorities;
  throw std::invalid_argument("schedule " + name + "; accepted: round_robin, random, priorities");
}

Copies copies_named(const std::string& name) {
  if (name == "late") return Copies::late;
  if (name == "early") return Copies::early;
  if (name == "random") return Copies::random;
  throw std::invalid_argument("copies " + name + "; accepted: late, early, random");
}

size_t take_place() { return machine.places_taken++ % kPlaces; }

void* race_fiber(size_t place) {
  if (!race::on()) return nullptr;
  race::Ignore ignore;
  auto& fibers = machine.race_fibers;
  if (place >= fibers.size()) fibers.resize(place + 1);
  if (!fibers[place]) fibers[place] = race::create_fiber();
  return fibers[place];
}

Options& options() { return machine.options; }
Counters& counters() { return machine.counters; }
Thread& running() { return *machine.current; }
Cta& running_cta() { return *machine.cta; }
const Dim3& thread_index() { return machine.current->index; }
const Dim3& block_index() { return machine.cta->index; }
const Dim3& block_dim() { return machine.block; }
const Dim3& grid_dim() { return machine.grid; }

uint64_t random_bits() {  // xorshift64*
  uint64_t& s = machine.random_state;
  s ^= s >> 12;
  s ^= s << 25;
  s ^= s >> 27;
  return s * 2685821657736338717ull >> 16;
}

void fail(const char* format, ...) {
  Thread* thread = machine.current;
  {
    race::Ignore ignore;
    char what[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    const Dim3& at = machine.cta->index;
    snprintf(machine.message, sizeof machine.message, "CTA (%u, %u, %u), thread %u: %s", at.x, at.y, at.z,
             thread ? thread->linear : 0, what);
  }
  machine.failed = true;
  if (!thread) throw Error(machine.message);
  machine.current = nullptr;
  race::switch_to(machine.host_race_fiber);
  Fiber::switch_from_to(thread->fiber, machine.host);  // the CTA is taken down; this thread never goes on
  abort();
}

void block(const char* at, int what) {
  Thread& self = *machine.current;
  self.state = Thread::State::blocked;
  self.waits_at = at;
  self.waits_for = what;
  self.warp->ready &= ~(1u << self.lane);
  reschedule(self);
}

void wake(Thread& thread) {
  if (thread.state != Thread::State::blocked) return;
  thread.state = Thread::State::ready;
  thread.warp->ready |= 1u << thread.lane;
}

void maybe_preempt() {
  if (machine.options.schedule == Schedule::random && random_bits() % 8 == 0) reschedule(*machine.current);
}

void wait_for_grids() { machine.current->waited_for_grids = true; }

void launch(Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body, bool dependent) {
  if (machine.cta) throw Error("a kernel launches a kernel");
  if (block.count() == 0 || block.count() > 1024 || grid.count() == 0 || grid.y > 65535 || grid.z > 65535)
    throw Error("invalid configuration: grid (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                std::to_string(grid.z) + "), " + std::to_string(block.count()) + " threads");
  if (const size_t most = machine.options.shared_bytes; shared_bytes > most)
    throw Error(std::to_string(shared_bytes) + " bytes of shared memory; this device has " + std::to_string(most));
  machine.grid = grid;
  machine.block = block;
  machine.dependent = dependent;
  machine.body = &body;
  machine.places_taken = 0;
  machine.random_state = machine.options.seed * 0x9e3779b97f4a7c15ull | 1;
  for (int i = 0; i < 8; ++i) random_bits();
  machine.host_race_fiber = race::current_fiber();
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) run_cta(Dim3(x, y, z), shared_bytes);
  race::acquire(&machine.ended);
}

// ---- shared memory -------------------------------------------------------------------------------------------------

namespace {
constexpr uint32_t kSharedBase = 1024;  // so that an offset taken for an address is noticed
}

uint8_t* shared_memory() { return machine.cta->shared; }

uint32_t shared_address(const void* pointer) {
  const ptrdiff_t offset = static_cast<const uint8_t*>(pointer) - machine.cta->shared;
  if (offset < 0 || static_cast<size_t>(offset) > machine.cta->shared_bytes)
    fail("a pointer that is not into this CTA's shared memory is taken for one");
  return static_cast<uint32_t>(offset) + kSharedBase;
}

uint8_t* shared_pointer(uint32_t at, size_t bytes) {
  if (at < kSharedBase || at - kSharedBase + bytes > machine.cta->shared_bytes)
    fail("%zu bytes at offset %d are outside the %zu bytes of shared memory", bytes,
         static_cast<int>(at) - static_cast<int>(kSharedBase), machine.cta->shared_bytes);
  return machine.cta->shared + (at - kSharedBase);
}

}  // namespace simt
