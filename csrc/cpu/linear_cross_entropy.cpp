// Tokens are taken in chunks, the vocabulary in blocks. Of a chunk's logits, what the gradients need is kept, in the
// type that the products take (bf16 where these are formed of bf16):
//
//   1. scores       logits = hidden weight^T of a block; each row's maximum and sum of exponentials; kept are the
//                   exponentials, or the gradients where lse is known already
//   2. losses       the blocks' sums make the logsumexp of each row, and each row's factor for each block's
//   exponentials
//   3. dweight      exponentials become gradients in place; dweight[block] += gradients^T hidden: one task owns a block
//                   of dweight, and chunks come in order, so the sum has one order
//   4. dhidden      gradients weight (parallel over rows and columns)
//
// Without gradients a block of logits lives only as long as its task. With them, one pass serves loss and gradients,
// which saves the second computation of the logits (as in Liger Kernel, arXiv 2410.10989), at the price of what is kept
// of one chunk. exp is computed once: exponentials are relative to the maximum of their row in the block, hence at most
// 1.
#include "llmcore/linear_cross_entropy.h"

#include "cross_entropy_row.h"
#include "gemm_workers.h"
#include "split_sum.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

constexpr int64_t kTokenBlock = 2 * kBlockM;        // rows of a task of step 1
constexpr int64_t kMaxWords = 256, kMinWords = 64;  // of a block of the vocabulary
constexpr int64_t kDimBlock = 512;                  // columns of a gradient at a time
constexpr int64_t kPad = 16;                        // floats: strides are no powers of two
constexpr int64_t kScoreStride = kMaxWords + kPad, kSumStride = kDimBlock + kPad;  // of a worker's tile
constexpr int64_t kScoreTile = kTokenBlock * kScoreStride, kSumTile = kMaxWords * kSumStride;
constexpr int64_t kWorkerTile = kScoreTile > kSumTile ? kScoreTile : kSumTile;
static_assert(kWorkerTile >= kBlockM * kSumStride);

// Tokens of a chunk. With gradients, a chunk costs one reading and writing of dweight's sum: with 512 tokens 5 % of the
// time of the products. Below kLargeVocab that sum is small; half as many tokens cost 4 % there, but save a fifth of
// the memory.
constexpr int64_t kForwardChunk = 2 * kTokenBlock, kChunk = 512, kSmallChunk = 256, kLargeVocab = 16384;

LLMCORE_INLINE int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }
LLMCORE_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

int64_t chunk_for(const LinearCrossEntropyParams& p) {
  if (!p.dhidden && !p.dweight) return at_most(p.count, kForwardChunk);
  const int64_t limit = at_most(p.count, p.vocab < kLargeVocab ? kSmallChunk : kChunk);
  const int64_t even = limit > 0 ? blocks(p.count, blocks(p.count, limit)) : 0;
  return at_most(round_up(even, kTileRows), limit);
}

// Words of a block: as many as leave no thread idle for more than 5 % of the time, or the fewest.
int64_t words_for(int64_t vocab, int64_t threads) {
  int64_t words = kMaxWords;
  const auto idle = [&] { return blocks(vocab, words * threads) * words * threads - vocab; };
  while (words > kMinWords && idle() * 20 > vocab) words /= 2;
  return words;
}

struct Part {
  int64_t rows, columns;
};
// Of dhidden, for a task of step 4. Each packs all of its rows and columns, which costs as much as some products; rows,
// whose elements are transposed, cost more.
Part part_for(int64_t size, int64_t dim, int64_t threads) {
  constexpr int64_t kPackRow = 12, kPackColumn = 4;
  Part best{kTileRows, kPanel};
  int64_t least = INT64_MAX;
  for (int64_t cuts = blocks(size, kBlockM); cuts < 2 * size; cuts *= 2) {
    const int64_t rows = round_up(blocks(size, cuts), kTileRows);
    for (int64_t columns = kDimBlock; columns >= kPanel; columns /= 2) {
      const int64_t width = at_most(columns, dim), rounds = blocks(blocks(size, rows) * blocks(dim, columns), threads),
                    cost = rounds * (rows * width + kPackRow * rows + kPackColumn * width);
      if (cost < least) best = {rows, columns}, least = cost;
    }
  }
  return best;
}

template <class T>
class Sweep {
  using G = typename GemmProduct<T, T>::type::Value;
  static constexpr int64_t kLine = 64 / sizeof(G);             // strides are odd multiples of it: columns are read, too
  static constexpr bool kDirect = sizeof(T) == sizeof(float);  // dweight is its own float sum

 public:
  Sweep(const LinearCrossEntropyParams& p, const Parallel& par)
      : p_(p),
        par_(par),
        gradients_(p.dhidden || p.dweight),
        words_(words_for(p.vocab, par.threads)),
        num_blocks_(blocks(p.vocab, words_)),
        kept_stride_(round_up(p.vocab, kLine) | kLine),
        chunk_(chunk_for(p)),
        workers_(par.threads, kWorkerTile),
        kept_(gradients_ ? chunk_ * kept_stride_ : 0),
        stats_(chunk_ * 3 * num_blocks_),
        targets_(chunk_),
        gathered_(adjacent() ? 0 : chunk_ * p.dim),
        dweight_(static_cast<T*>(p.dweight), p.dweight && !kDirect && p.count > chunk_ ? p.vocab * p.dim : 0) {}

  void run() {
    for (begin_ = 0; begin_ < p_.count; begin_ += chunk_) {
      size_ = at_most(p_.count - begin_, chunk_);
      tokens_ = p_.tokens + begin_;
      gather();
      scores();
      if (p_.loss) losses();
      if (gradients_) weight_gradient();
      if (p_.dhidden) hidden_gradient();
    }
  }

 private:
  bool adjacent() const { return p_.count == 0 || p_.tokens[p_.count - 1] - p_.tokens[0] == p_.count - 1; }
  float dloss(int64_t token) const { return p_.dloss ? p_.dloss[token] : p_.dloss_of_all; }
  int64_t words_of(int64_t block) const { return at_most(p_.vocab - block * words_, words_); }
  G* kept(int64_t block, int64_t i) const { return kept_.data() + i * kept_stride_ + block * words_; }
  // Of row i: maxima (after step 2 the factors of the exponentials), sums of exponentials, sums, of each block.
  float* stats(int64_t i) const { return stats_.data() + i * 3 * num_blocks_; }

  void gather() {
    const T* rows = static_cast<const T*>(p_.hidden);
    if (adjacent()) {
      hidden_ = {rows + tokens_[0] * p_.hidden_stride, p_.hidden_stride, 1};
      return;
    }
    hidden_ = {gathered_.data(), p_.dim, 1};
    parallel_ranges(par_, size_, row_grain(p_.dim), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        __builtin_memcpy(gathered_.data() + i * p_.dim, rows + tokens_[i] * p_.hidden_stride, p_.dim * sizeof(T));
    });
  }

  void scores() {
    const int64_t token_blocks = blocks(size_, kTokenBlock);
    parallel_tasks(par_, token_blocks * num_blocks_, [&](int64_t task, int64_t worker) {
      const int64_t first = task % token_blocks * kTokenBlock, rows = at_most(size_ - first, kTokenBlock);
      const int64_t block = task / token_blocks, words = words_of(block);
      float* tile = workers_.tile(worker);
      Matrix<T> hidden = hidden_;
      hidden.data += first * hidden.row_stride;
      const T* weight = static_cast<const T*>(p_.weight) + block * words_ * p_.weight_stride;
      gemm(rows, words, p_.dim, hidden, Matrix<T>{weight, 1, p_.weight_stride}, tile, kScoreStride, false,
           workers_.packing(worker));
      for (int64_t i = 0; i < rows; ++i) score_row(tile + i * kScoreStride, first + i, block, words);
    });
  }

  void score_row(float* row, int64_t i, int64_t block, int64_t words) {
    if (p_.softcap > 0.f) cap(row, words, p_.softcap);
    const int64_t token = tokens_[i], target = p_.targets[token] - block * words_;
    if (!p_.loss) {
      differentiate(row, kept(block, i), words, target, RowGradient(p_, dloss(token), p_.lse[token]));
      return;
    }
    if (target >= 0 && target < words) targets_.data()[i] = row[target];
    float* of_block = stats(i) + block;
    if (!gradients_) {
      summarise(row, words, of_block, num_blocks_);
      return;
    }
    const float inverse_cap = p_.softcap > 0.f ? 1.f / p_.softcap : 0.f;
    G* out = kept(block, i);
    summarise(row, words, of_block, num_blocks_, [&](int64_t j, vf e, vf x, auto lanes) {
      const vf tanh_of = x * inverse_cap;
      store_n(out + j, e * (1.f - tanh_of * tanh_of), lanes);
    });
  }

  void losses() {
    parallel_ranges(par_, size_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float *tops = stats(i), *sums = tops + num_blocks_, *totals = sums + num_blocks_;
        float top = tops[0];
        for (int64_t b = 1; b < num_blocks_; ++b) top = tops[b] > top ? tops[b] : top;
        vf sum = zero(), total = zero();
        for (int64_t b = 0; b < num_blocks_; b += kLanes) {
          const int64_t n = num_blocks_ - b;
          const vf share = exp2_nonpositive((load_n(tops + b, n) - top) * kLog2e);  // anything in the lanes beyond n
          sum = fma(load_n(sums + b, n), iota() < static_cast<int32_t>(at_most(n, kLanes)) ? share : zero(), sum);
          total += load_n(totals + b, n);
        }
        const int64_t token = tokens_[i];
        float& target = targets_.data()[i];
        const float lse = top + __builtin_logf(reduce_sum(sum));
        float loss = lse - target;
        if (p_.label_smoothing != 0.f)
          loss += p_.label_smoothing * (target - reduce_sum(total) / static_cast<float>(p_.vocab));
        p_.lse[token] = lse;
        p_.loss[token] = loss + p_.z_loss * lse * lse;
        if (!gradients_) continue;
        const RowGradient gradient(p_, dloss(token), lse);
        target = gradient.at_target(target);
        for_row(num_blocks_, [&](int64_t b, auto lanes) {
          store_n(tops + b, exp2_nonpositive((load_n(tops + b, lanes) - lse) * kLog2e) * gradient.of_lse, lanes);
        });
      }
    });
  }

  // The exponentials of a block become gradients.
  void scale(int64_t block, int64_t words) {
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t token = tokens_[i], target = p_.targets[token] - block * words_;
      const float factor = stats(i)[block], of_mean = RowGradient(p_, dloss(token), 0.f).of_mean;
      G* row = kept(block, i);
      for_row(words,
              [&](int64_t j, auto lanes) { store_n(row + j, load_n(row + j, lanes) * factor - of_mean, lanes); });
      if (target >= 0 && target < words) row[target] = from_float<G>(targets_.data()[i]);
    }
  }

  void weight_gradient() {
    const bool first = begin_ == 0, last = begin_ + size_ == p_.count;
    parallel_tasks(par_, num_blocks_, [&](int64_t block, int64_t worker) {
      const int64_t words = words_of(block);
      if (p_.loss) scale(block, words);
      if (!p_.dweight) return;
      const Matrix<G> gradient{kept(block, 0), 1, kept_stride_};
      for (int64_t column = 0; column < p_.dim; column += kDimBlock) {
        const int64_t columns = at_most(p_.dim - column, kDimBlock), at = block * words_ * p_.dim + column;
        const Matrix<T> hidden{hidden_.data + column, hidden_.row_stride, 1};
        if constexpr (kDirect) {
          gemm(words, columns, size_, gradient, hidden, static_cast<T*>(p_.dweight) + at, p_.dim, !first,
               workers_.packing(worker));
        } else {
          float* sum = workers_.tile(worker);
          gemm(words, columns, size_, gradient, hidden, sum, kSumStride, false, workers_.packing(worker));
          for (int64_t i = 0; i < words; ++i) dweight_.add(at + i * p_.dim, sum + i * kSumStride, columns, first, last);
        }
      }
    });
  }

  void hidden_gradient() {
    const Part part = part_for(size_, p_.dim, par_.threads);
    const int64_t across = blocks(p_.dim, part.columns);
    parallel_tasks(par_, blocks(size_, part.rows) * across, [&](int64_t task, int64_t worker) {
      const int64_t first = task / across * part.rows, rows = at_most(size_ - first, part.rows);
      const int64_t column = task % across * part.columns, columns = at_most(p_.dim - column, part.columns);
      const T* weight = static_cast<const T*>(p_.weight) + column;
      float* sum = workers_.tile(worker);
      gemm(rows, columns, p_.vocab, Matrix<G>{kept(0, first), kept_stride_, 1}, Matrix<T>{weight, p_.weight_stride, 1},
           sum, kSumStride, false, workers_.packing(worker));
      for (int64_t i = 0; i < rows; ++i)
        store_row(static_cast<T*>(p_.dhidden) + tokens_[first + i] * p_.dim + column, sum + i * kSumStride, columns);
    });
  }

  const LinearCrossEntropyParams& p_;
  const Parallel& par_;
  const bool gradients_;
  const int64_t words_, num_blocks_, kept_stride_, chunk_;
  GemmWorkers workers_;
  Scratch<G> kept_;  // (chunk_, kept_stride_): exponentials, then gradients
  Scratch<float> stats_;
  Scratch<float> targets_;  // logits of the chunk's targets, then their gradients
  Scratch<T> gathered_;     // rows of hidden, when not all of them count
  SplitSum<T> dweight_;
  // the chunk
  int64_t begin_ = 0, size_ = 0;
  const int64_t* tokens_ = nullptr;
  Matrix<T> hidden_{};
};

template <class T>
void run(const LinearCrossEntropyParams& p, const Parallel& par) {
  if (p.loss && (p.dhidden || p.dweight) && p.softcap > 0.f && p.label_smoothing != 0.f) {
    // Exponentials times the derivative of the cap are not all that the gradients need then: lse goes first.
    LinearCrossEntropyParams forward = p, backward = p;
    forward.dhidden = forward.dweight = nullptr;
    backward.loss = nullptr;
    Sweep<T>(forward, par).run();
    Sweep<T>(backward, par).run();
    return;
  }
  Sweep<T>(p, par).run();
}

}  // namespace

void linear_cross_entropy(const LinearCrossEntropyParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, run<T>(p, par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
