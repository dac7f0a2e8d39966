// cp.async: copies from global to shared memory that happen some time between their issue and the wait for their group.
// They are visible to the issuing thread after its wait; to others only by way of a barrier after that.
#include <cstring>

#include "machine.h"

namespace simt {
namespace {

void perform(const CopyAsync& copy) {
  race::Ignore ignore;
  uint8_t bytes[16] = {};
  if (copy.source_bytes) memcpy(bytes, copy.from, copy.source_bytes);
  memcpy(copy.to, bytes, 16);
}

// Whatever the schedule, the hardware may touch both ends from the issue on.
void announce(Thread& thread, const CopyAsync& copy) {
  if (!race::on()) return;
  CopyEngine* engine = nullptr;
  for (CopyEngine& other : thread.copy_engines)
    if (other.group == copy.group) engine = &other;
  for (CopyEngine& other : thread.copy_engines)
    if (!engine && other.group == CopyEngine::kIdle) engine = &other;
  if (!engine) {
    race::Ignore ignore;
    engine = &thread.copy_engines.emplace_back(CopyEngine{copy.group, race_fiber(take_place())});
  }
  engine->group = copy.group;
  race::switch_and_order(engine->race_fiber);
  race::read(copy.from, copy.source_bytes);
  race::wrote(copy.to, 16);
  race::switch_to(thread.race_fiber);
}

void perform_up_to(Thread& thread, int last_group) {
  size_t kept = 0;
  for (const CopyAsync& copy : thread.copies) {
    if (copy.group <= last_group)
      perform(copy);
    else
      thread.copies[kept++] = copy;
  }
  thread.copies.resize(kept);
  for (CopyEngine& engine : thread.copy_engines) {
    if (engine.group > last_group || engine.group == CopyEngine::kIdle) continue;
    race::switch_to(engine.race_fiber);
    race::switch_and_order(thread.race_fiber);
    engine.group = CopyEngine::kIdle;
  }
}

}  // namespace

void copy_async_16(uint32_t to, const void* from, int source_bytes) {
  ++counters().copies;
  if (to % 16) fail("cp.async: the destination %u is not a multiple of 16", to);
  if (source_bytes < 0 || source_bytes > 16) fail("cp.async: %d source bytes; 0 to 16", source_bytes);
  if (source_bytes && reinterpret_cast<uintptr_t>(from) % 16)
    fail("cp.async: the source %p is not a multiple of 16", from);
  Thread& self = running();
  const CopyAsync copy{shared_pointer(to, 16), static_cast<const uint8_t*>(from), source_bytes, self.copy_group};
  announce(self, copy);
  const Copies when = options().copies;
  if (when == Copies::early || (when == Copies::random && random_bits() % 2)) {
    perform(copy);
    return;
  }
  race::Ignore ignore;
  self.copies.push_back(copy);
  memset(copy.to, 0xff, 16);
}

void copy_commit() { ++running().copy_group; }

void copy_wait(int groups_in_flight) { perform_up_to(running(), running().copy_group - 1 - groups_in_flight); }

void finish_copies(Thread& thread) { perform_up_to(thread, thread.copy_group); }

void check_alignment(const void* at, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) fail("%zu bytes at %p, which is not a multiple of that", bytes, at);
}

void atomic_add(float* at, float value) {
  const float sum =
      *at + value;  // only one thread runs at a time: what is read here is still there when it is replaced
  unsigned bits;
  memcpy(&bits, &sum, sizeof bits);
  race::atomic_store(reinterpret_cast<unsigned*>(at), bits);
}
void atomic_add(int32_t* at, int32_t value) {
  race::Ignore ignore;
  *at += value;
}

uint64_t atomic_add(uint64_t* at, uint64_t value) {
  race::Ignore ignore;
  const uint64_t before = *at;
  *at += value;
  return before;
}

uint64_t atomic_max(uint64_t* at, uint64_t value) {
  race::Ignore ignore;
  const uint64_t before = *at;
  if (value > before) *at = value;
  return before;
}

}  // namespace simt
