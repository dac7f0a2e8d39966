// Kernels over a list of tensors. A launch takes as many of them as fit into a kernel's parameters: a table in device
// memory would have to be copied there first, and could not be captured in a CUDA graph.
#pragma once
#include "launch.cuh"

namespace llmcore {
namespace cuda {

// Part of a list. Tensor has `first_tile`, the number of tiles of all tensors before it.
template <class Tensor>
struct TensorPart {
  static constexpr int kMost = 3584 / sizeof(Tensor);  // of 4096 bytes, which every driver takes
  int64_t first;                                       // the index of tensors[0] in the whole list
  int count;
  Tensor tensors[kMost];
};

// Which of part.tensors holds `tile`. Tensors without a tile are passed over.
template <class Tensor>
PTX_DEVICE int tensor_of(const TensorPart<Tensor>& part, int64_t tile) {
  int low = 0, high = part.count;  // first_tile of `low` is not above tile, that of `high` is
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (part.tensors[middle].first_tile <= tile)
      low = middle;
    else
      high = middle;
  }
  return low;
}

template <class... Pointers>
PTX_DEVICE bool at_16_bytes(Pointers... pointers) {  // null pointers are
  return (... | reinterpret_cast<uintptr_t>(pointers)) % 16 == 0;
}

// f(part, tiles) for each part of the list, until one fails.
template <class Tensor, class F>
Status for_parts(const Tensor* tensors, int64_t count, int64_t tiles, const F& f) {
  using Part = TensorPart<Tensor>;
  for (int64_t first = 0; first < count; first += Part::kMost) {
    const int64_t left = count - first, n = left < Part::kMost ? left : Part::kMost;
    Part part{first, static_cast<int>(n), {}};
    for (int64_t i = 0; i < n; ++i) part.tensors[i] = tensors[first + i];
    const int64_t end = n < left ? tensors[first + n].first_tile : tiles;
    if (Status error = f(part, end - tensors[first].first_tile)) return error;
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace llmcore
