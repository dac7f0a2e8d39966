// Small kernels that test the emulator (and, compiled by nvcc, a GPU against it): each in a version that is right, and
// in versions with one planted bug, beside what must come of it.
#pragma once
#include <string>
#include <vector>

namespace programs {

enum class Seen {
  right,           // the expected numbers
  wrong_numbers,   // others, or NaN
  error,           // the launch failed, with a text
  bank_conflicts,  // the expected numbers, but ldmatrix took more than one wavefront for a matrix
};

struct Outcome {
  Seen seen;
  std::string text;  // of the error, or the first wrong number
};

// Must come out right on any machine, under every schedule.
struct Correct {
  const char* name;
  Outcome (*run)();
};

// What the emulator must make of a planted bug, as far as it depends on when asynchronous copies happen.
struct Planted {
  const char* name;
  Outcome (*run)();
  Seen late, early;             // the outcome
  bool race_late, race_early;   // whether ThreadSanitizer reports it
  const char* error_text = "";  // what the error's text holds
  // Takes a warp that runs far ahead, which uniformly random choices hardly ever give.
  bool missed_at_random = false;
};

std::vector<Correct> known_answers();  // one for each wrapper of csrc/cuda/ptx.cuh
std::vector<Correct> correct_programs();
std::vector<Planted> planted_bugs();  // never to be run on a GPU

// The two kernels that bugs are planted in.
Correct correct_tile_product();
std::vector<Planted> planted_in_tile_product();
Correct correct_block_sum();
std::vector<Planted> planted_in_block_sum();

}  // namespace programs
