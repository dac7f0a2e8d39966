#include "llmcore/global_norm.h"

#include "case.h"

using namespace llmcore;
using namespace races;

RACE_CASE(global_norm) {
  constexpr int64_t kLarge = kNormTile + 77, kSmall = 40, kTiles = 3;
  for (DType dtype : kFloats) {
    const Tensor large = random_normal(dtype, kLarge), small = random_normal(dtype, kSmall + 1);
    const char* odd = small.as<char>() + (dtype == DType::f32 ? 4 : 2);  // not at a multiple of 16 bytes
    Tensor partials = Tensor::doubles(kTiles), norm(DType::f32, 1);
    const NormTensor list[] = {{kLarge, 0, large.data()}, {0, 2, small.data()}, {kSmall, 2, odd}};
    const GlobalNormParams p{dtype, 3, kTiles, list, partials.as<double>(), norm.as<float>()};
    check(name(dtype), BOTH(global_norm), p, {{"norm", norm, false, 1e-6}});
  }
}
