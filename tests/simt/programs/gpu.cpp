// The correct programs on a GPU: does silicon agree with what the emulator is held to? Exits with 1 when it does not.
#include <cstdio>

#include "program.h"

int main() {
  int wrong = 0;
  for (const auto& program : programs::correct_programs()) {
    const programs::Outcome outcome = program.run();
    const bool right = outcome.seen == programs::Seen::right;
    printf("%-6s %s %s\n", right ? "ok" : "FAILED", program.name, outcome.text.c_str());
    wrong += !right;
  }
  return wrong ? 1 : 0;
}
