// The named barriers of a CTA.
#include <utility>

#include "machine.h"

namespace simt {
namespace {

NamedBarrier& arrive(int id, unsigned threads, const char* operation) {
  if (id < 0 || id > 15) fail("%s %d: barriers are numbered 0 to 15", operation, id);
  NamedBarrier& barrier = running_cta().barriers[id];
  const unsigned all = static_cast<unsigned>(running_cta().threads.size());
  const unsigned expected = threads ? threads : all;
  if (expected % 32 && expected != all)
    fail("%s %d: %u threads is not a multiple of the warp size", operation, id, expected);
  if (barrier.arrived && barrier.expected != expected)
    fail("%s %d for %u threads, while %u of %u have arrived", operation, id, expected, barrier.arrived,
         barrier.expected);
  barrier.expected = expected;
  ++barrier.arrived;
  race::release(barrier.meeting.now());
  return barrier;
}

bool complete(NamedBarrier& barrier) {
  if (barrier.arrived < barrier.expected) return false;
  barrier.arrived = 0;
  ++barrier.meeting.round;
  race::Ignore ignore;
  for (Thread* thread : std::exchange(barrier.waiting, {})) wake(*thread);
  return true;
}

}  // namespace

void barrier_sync(int id, unsigned threads) {
  ++counters().barriers;
  void* here = running_cta().barriers[id & 15].meeting.now();
  NamedBarrier& barrier = arrive(id, threads, "bar.sync");
  if (complete(barrier)) {
    maybe_preempt();
  } else {
    {
      race::Ignore ignore;
      barrier.waiting.push_back(&running());
    }
    block("bar.sync", id);
  }
  race::acquire(here);
}

void barrier_arrive(int id, unsigned threads) {
  complete(arrive(id, threads, "bar.arrive"));
  maybe_preempt();
}

}  // namespace simt
