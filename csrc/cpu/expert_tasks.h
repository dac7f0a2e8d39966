// One list of tasks for all experts, each of which has as many as its rows give.
#pragma once
#include <cstdint>

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {

// Numbers the tasks of all experts: first[e] .. first[e + 1] are those of expert e.
template <class CountFn>
int64_t number_tasks(int64_t num_experts, int64_t* first, const CountFn& count) {
  first[0] = 0;
  for (int64_t e = 0; e < num_experts; ++e) first[e + 1] = first[e] + count(e);
  return first[num_experts];
}
inline int64_t expert_of(const int64_t* first, int64_t num_experts, int64_t task) {  // the last e with first[e] <= task
  int64_t low = 0, high = num_experts;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first[middle] <= task ? low : high) = middle;
  }
  return low;
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
