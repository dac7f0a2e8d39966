#include "llmcore/global_norm.h"

#include "common.h"

namespace llmcore {
namespace {

Tensor global_norm(std::vector<Tensor> tensors) {
  LLMCORE_CHECK(!tensors.empty(), "global_norm: the list of tensors is empty; accepted: one or more");
  const DType dtype = float_dtype(tensors[0], "global_norm: tensors[0]");
  std::vector<NormTensor> list;
  int64_t tiles = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string what = "global_norm: tensors[" + std::to_string(i) + "]";
    check_device(tensors[i], tensors[0], what.c_str());
    check_same_dtype(tensors[i], tensors[0], what.c_str(), "tensors[0]");
    tensors[i] = dense(tensors[i]);
    list.push_back({tensors[i].numel(), tiles, tensors[i].const_data_ptr()});
    tiles += (tensors[i].numel() + kNormTile - 1) / kNormTile;
  }
  const Tensor norm = empty(tensors[0], {}, ScalarType::Float);
  const Tensor partials = empty(tensors[0], {tiles}, ScalarType::Double);
  const GlobalNormParams p{dtype,
                           static_cast<int64_t>(list.size()),
                           tiles,
                           list.data(),
                           static_cast<double*>(partials.mutable_data_ptr()),
                           static_cast<float*>(norm.mutable_data_ptr())};
  LLMCORE_RUN(global_norm, tensors[0], p);
  return norm;
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("global_norm", TORCH_BOX(&global_norm));
}

}  // namespace

LLMCORE_REGISTER(register_kernels)

}  // namespace llmcore
