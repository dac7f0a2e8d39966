// emulator_test SCHEDULE COPIES: every correct program must come out right, and every planted bug must be found as its
// table says, when the emulator runs them in this mode. Prints a line for each; exits with 1 when one is off.
#include <cstdio>

#include "program.h"
#include "simt.h"

namespace {

using programs::Outcome;
using programs::Seen;
constexpr uint64_t kSeeds = 10;

const char* describe(Seen seen) {
  switch (seen) {
    case Seen::right: return "right";
    case Seen::wrong_numbers: return "wrong numbers";
    case Seen::error: return "error";
    case Seen::bank_conflicts: return "bank conflicts";
  }
  return "?";
}

bool report(bool as_expected, const char* name, const Outcome& outcome) {
  printf("%-6s %s: %s%s%s\n", as_expected ? "ok" : "FAILED", name, describe(outcome.seen),
         outcome.text.empty() ? "" : ": ", outcome.text.c_str());
  return as_expected;
}

// The first outcome that is not right, or right.
Outcome over_seeds(Outcome (*run)()) {
  Outcome outcome{Seen::right, ""};
  for (uint64_t seed = 1; seed <= kSeeds && outcome.seen == Seen::right; ++seed) {
    simt::options().seed = seed;
    outcome = run();
  }
  return outcome;
}

bool as_planted(const programs::Planted& planted, const Outcome& outcome) {
  if (planted.missed_at_random && simt::options().schedule == simt::Schedule::random && outcome.seen == Seen::right)
    return true;
  switch (simt::options().copies) {
    case simt::Copies::late: return outcome.seen == planted.late;
    case simt::Copies::early: return outcome.seen == planted.early;
    case simt::Copies::random: return outcome.seen == planted.late || outcome.seen == planted.early;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return fprintf(stderr, "usage: %s SCHEDULE COPIES\n", argv[0]), 2;
  simt::options() = {simt::schedule_named(argv[1]), simt::copies_named(argv[2]), 1};
  bool good = true;
  for (const auto& program : programs::correct_programs()) {
    const Outcome outcome = over_seeds(program.run);
    good &= report(outcome.seen == Seen::right, program.name, outcome);
  }
  for (const auto& planted : programs::planted_bugs()) {
    const Outcome outcome = over_seeds(planted.run);
    const bool text_fits = outcome.seen == Seen::right || outcome.text.find(planted.error_text) != std::string::npos;
    good &= report(as_planted(planted, outcome) && text_fits, planted.name, outcome);
  }
  return good ? 0 : 1;
}
