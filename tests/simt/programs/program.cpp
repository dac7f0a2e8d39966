#include "program.h"

namespace programs {

std::vector<Correct> correct_programs() {
  std::vector<Correct> all = known_answers();
  all.push_back(correct_tile_product());
  all.push_back(correct_block_sum());
  return all;
}

}  // namespace programs
