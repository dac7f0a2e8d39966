// Apart from program.cpp, since only the emulator's programs hold planted bugs.
#include "program.h"

namespace programs {

std::vector<Planted> planted_bugs() {
  std::vector<Planted> all = planted_in_tile_product();
  for (const Planted& bug : planted_in_block_sum()) all.push_back(bug);
  return all;
}

}  // namespace programs
