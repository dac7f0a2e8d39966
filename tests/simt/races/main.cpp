// races --list, or races CASE SCHEDULE COPIES: one case under ThreadSanitizer, in one mode of the emulator. A case is
// the name of a kernel, whose results must also be right, or of a program of tests/simt/programs, planted bugs
// included. Ends with 0 when all is well, with 1 on wrong results, and with kReported at the first report.
#include <cstdio>
#include <cstring>

#include "../programs/program.h"
#include "case.h"
#include "simt.h"

namespace {
constexpr int kReported = 66;

int run_kernel(const races::Case& found) {
  try {
    found.run();
  } catch (const std::exception& error) {
    fprintf(stderr, "%s: %s\n", found.kernel, error.what());
    return 1;
  }
  return 0;
}

// The list: name, then for planted bugs whether a report is due when copies are late, and when they are early.
void list() {
  for (const auto& kernel : races::cases()) printf("kernel %s\n", kernel.kernel);
  for (const auto& program : programs::correct_programs()) printf("correct %s\n", program.name);
  for (const auto& bug : programs::planted_bugs())
    printf("planted %s %d %d\n", bug.name, bug.race_late, bug.race_early);
}

}  // namespace

// Read by the runtime as it starts. A failed launch leaves threads in the middle of things, which are no leaks.
extern "C" const char* __tsan_default_options() {
  return "halt_on_error=1:exitcode=66:report_thread_leaks=0:atexit_sleep_ms=0";
}
static_assert(kReported == 66);

int main(int argc, char** argv) {
  if (argc == 2 && !strcmp(argv[1], "--list")) return list(), 0;
  if (argc != 4) return fprintf(stderr, "usage: %s --list | CASE SCHEDULE COPIES\n", argv[0]), 2;
  simt::options() = {simt::schedule_named(argv[2]), simt::copies_named(argv[3]), 1};
  for (const auto& kernel : races::cases())
    if (!strcmp(kernel.kernel, argv[1])) return run_kernel(kernel);
  for (const auto& program : programs::correct_programs())
    if (!strcmp(program.name, argv[1])) {
      const programs::Outcome outcome = program.run();
      if (outcome.seen != programs::Seen::right) fprintf(stderr, "%s: %s\n", argv[1], outcome.text.c_str());
      return outcome.seen == programs::Seen::right ? 0 : 1;
    }
  for (const auto& bug : programs::planted_bugs())
    if (!strcmp(bug.name, argv[1])) return bug.run(), 0;  // what comes of it is emulator_test's business
  return fprintf(stderr, "no case is called %s\n", argv[1]), 2;
}
