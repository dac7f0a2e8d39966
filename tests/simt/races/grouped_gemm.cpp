#include "llmcore/grouped_gemm.h"

#include "case.h"

using namespace llmcore;
using namespace races;

namespace {

constexpr DType kHalves[] = {DType::bf16, DType::f16};

// Rows of tokens, two each, over three experts of which one has none. Behind the last of them memory holds another one,
// with a row, that the call says nothing of: who looked for a tile too far would write it.
struct Rows {
  std::vector<int32_t> offsets, token_of;
  explicit Rows(std::vector<int32_t> ends) : offsets(std::move(ends)), token_of(offsets.back()) {
    for (size_t r = 0; r < token_of.size(); ++r) token_of[r] = static_cast<int32_t>(r * 7 % token_of.size() / 2);
  }
  int64_t experts() const { return static_cast<int64_t>(offsets.size()) - 2; }
  int64_t count() const { return offsets[experts()]; }
  int64_t in_memory() const { return offsets.back(); }
};

std::vector<Rows> distributions() { return {Rows({0, 3, 3, 21, 22}), Rows({0, 130, 130, 134, 135})}; }  // few, and many

// One in two parts when rows are few, and one whose rows are not aligned.
std::vector<int64_t> sums(const Rows& rows) { return {rows.count() < 100 ? 584 : 136, 75}; }

GroupedGemmParams product(DType dtype, const Rows& rows, int64_t n, int64_t k, const Tensor& x, const Tensor& weight) {
  return {dtype, rows.count(),        rows.experts(),       n,       k,      x.data(), k, weight.data(), n * k, 1,
          k,     rows.offsets.data(), rows.token_of.data(), nullptr, nullptr};
}

}  // namespace

RACE_CASE(grouped_gemm) {
  for (DType dtype : kHalves)
    for (const Rows& rows : distributions())
      for (int64_t k : sums(rows)) {
        constexpr int64_t kColumns = 40;
        const Tensor x = random_normal(dtype, rows.in_memory() * k),
                     weight = random_normal(dtype, (rows.experts() + 1) * kColumns * k);
        Tensor y(dtype, rows.in_memory() * kColumns);
        GroupedGemmParams p = product(dtype, rows, kColumns, k, x, weight);
        p.y = y.data();
        const Tensor memory(DType::i8, cuda::grouped_gemm_workspace(p, kDevice));
        p.workspace = memory.data();
        check("gathered", BOTH(grouped_gemm), p, {{"y", y}});
        p.token_of = nullptr;  // the weight read the other way
        p.k_stride = kColumns;
        p.n_stride = 1;
        check("transposed", BOTH(grouped_gemm), p, {{"y", y}});
      }
}

RACE_CASE(grouped_glu) {
  for (DType dtype : kHalves)
    for (const Rows& rows : distributions())
      for (int64_t k : sums(rows)) {
        constexpr int64_t kColumns = 72;  // of both halves
        const Tensor x = random_normal(dtype, rows.in_memory() * k),
                     weight = random_uniform(dtype, rows.experts() * kColumns * k, -0.1, 0.1);
        Tensor out(dtype, rows.in_memory() * kColumns / 2), kept(dtype, rows.in_memory() * kColumns);
        GroupedGluParams p{product(dtype, rows, kColumns, k, x, weight), Activation::silu, out.data(), nullptr};
        const Tensor memory(DType::i8, cuda::grouped_glu_workspace(p, kDevice));
        p.workspace = memory.data();
        // the CPU kernel rounds before the activation: two roundings more
        check("result alone", BOTH(grouped_glu), p, {{"out", out, false, 4e-2}});
        p.product.y = kept.data();
        p.activation = Activation::gelu_tanh;
        check("with what is kept", BOTH(grouped_glu), p, {{"out", out, false, 4e-2}, {"kept", kept}});
      }
}

RACE_CASE(grouped_gemm_weight_grad) {
  for (DType dtype : kHalves)
    for (const Rows& rows : distributions())
      for (int64_t k : {136, 75}) {  // wide and narrow tiles
        constexpr int64_t kColumns = 40;
        const Tensor dy = random_normal(dtype, rows.in_memory() * kColumns),
                     x = random_normal(dtype, rows.in_memory() * k);
        Tensor dweight(dtype, (rows.experts() + 1) * kColumns * k);
        const GroupedGemmWeightGradParams p{dtype,
                                            rows.experts(),
                                            kColumns,
                                            k,
                                            dy.data(),
                                            kColumns,
                                            x.data(),
                                            k,
                                            rows.offsets.data(),
                                            rows.token_of.data(),
                                            dweight.data()};
        check("gathered", BOTH(grouped_gemm_weight_grad), p, {{"dweight", dweight}});
      }
}
