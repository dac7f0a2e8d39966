#include "llmcore/rope.h"

#include "case.h"

using namespace llmcore;
using namespace races;

RACE_CASE(rope) {
  constexpr int64_t kBatch = 2, kSeq = 3, kHeads = 2, kPositions = 9;
  const std::vector<int64_t> positions = {4, 0, 8, 8, 3, 1};
  for (DType dtype : kFloats)
    for (bool interleaved : {false, true})
      for (int64_t head_dim : {64, 37})  // 16 bytes at a time, and one by one
        for (bool in_place : {false, true}) {
          const int64_t rotary_dim = head_dim == 64 ? 48 : 22, n = kBatch * kSeq * kHeads * head_dim;
          const Tensor cos = random_uniform(DType::f32, kPositions * rotary_dim / 2, -1, 1),
                       sin = random_uniform(DType::f32, kPositions * rotary_dim / 2, -1, 1);
          const Tensor x = random_normal(dtype, n);
          Tensor y(dtype, n);
          const int64_t strides[] = {kSeq * kHeads * head_dim, kHeads * head_dim, head_dim};
          RopeParams p{dtype,
                       kBatch,
                       kSeq,
                       kHeads,
                       head_dim,
                       rotary_dim,
                       interleaved,
                       /*inverse=*/in_place,
                       x.data(),
                       {strides[0], strides[1], strides[2]},
                       y.data(),
                       {strides[0], strides[1], strides[2]},
                       cos.as<float>(),
                       sin.as<float>(),
                       in_place ? nullptr : positions.data()};
          if (in_place) p.x = p.y;
          check(name(dtype), BOTH(rope), p, {{"y", y, false, 0, in_place ? &x : nullptr}});
        }
}
