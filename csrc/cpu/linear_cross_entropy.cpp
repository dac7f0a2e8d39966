// Tokens are taken in chunks. The logits of a chunk are computed in tiles, one per block of the vocabulary:
//
//   1. scores       tile = hidden weight^T (parallel over tiles), with each row's maximum and sum of exponentials
//   2. loss         the tiles' sums make the logsumexp of each row
//   3. dweight      each tile is turned into its gradient in place, then dweight[block] += tile^T hidden: one task owns
//                   a block of dweight, and chunks come in order, so the sum has one order
//   4. dhidden      sum over tiles of tile weight[block] (parallel over rows and columns)
//
// Without gradients a tile lives only as long as its task. With them, one pass serves loss and gradients, which saves
// the second computation of the logits (as in Liger Kernel, arXiv 2410.10989), at the price of one chunk's logits.
#include "llmcore/linear_cross_entropy.h"

#include "cross_entropy_row.h"
#include "gemm_workers.h"

namespace llmcore {
namespace cpu {
namespace LLMCORE_ISA {
namespace {

constexpr int64_t kTokenBlock = 2 * kBlockM;         // rows of a task of step 1
constexpr int64_t kMaxChunk = 2 * kTokenBlock;       // tokens
constexpr int64_t kMinChunk = 64;                    // fewer would read and write dweight too often
constexpr int64_t kChunkLogits = int64_t{16} << 20;  // logits held at once, 64 MiB, unless kMinChunk asks for more
constexpr int64_t kMaxVocabBlock = 256, kMinVocabBlock = 64;
constexpr int64_t kTileStride = kMaxVocabBlock + 16;  // not a power of two: columns are read too
constexpr int64_t kDimBlock = kBlockN;                // columns of a task of step 4

LLMCORE_INLINE int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }
LLMCORE_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

// One chunk of tokens.
template <class T>
struct Chunk {
  int64_t size;
  const int64_t* tokens;  // (size)
  Matrix<T> hidden;       // (size, dim)
  float* tiles;           // (vocab blocks, size, kTileStride), or null: tiles are not kept
  float* stats;           // (size, 3, vocab blocks): maximum, sum of exp(logit - maximum), sum of the logits
};

template <class T>
void scores(const LinearCrossEntropyParams& p, const Chunk<T>& chunk, int64_t vocab_block, GemmWorkers& workers,
            const Parallel& par) {
  const int64_t token_blocks = blocks(chunk.size, kTokenBlock), vocab_blocks = blocks(p.vocab, vocab_block);
  parallel_tasks(par, token_blocks * vocab_blocks, [&](int64_t task, int64_t worker) {
    const int64_t first = task % token_blocks * kTokenBlock, rows = at_most(chunk.size - first, kTokenBlock);
    const int64_t block = task / token_blocks, word = block * vocab_block, words = at_most(p.vocab - word, vocab_block);
    float* tile = chunk.tiles ? chunk.tiles + (block * chunk.size + first) * kTileStride : workers.tile(worker);
    Matrix<T> hidden = chunk.hidden;
    hidden.data += first * hidden.row_stride;
    gemm(rows, words, p.dim, hidden,
         Matrix<T>{static_cast<const T*>(p.weight) + word * p.weight_stride, 1, p.weight_stride}, tile, kTileStride,
         false, workers.packing(worker));
    for (int64_t i = 0; i < rows; ++i) {
      float* row = tile + i * kTileStride;
      if (p.softcap > 0.f) cap(row, words, p.softcap);
      if (!p.loss) continue;
      summarise(row, words, chunk.stats + (first + i) * 3 * vocab_blocks + block, vocab_blocks);
      const int64_t token = chunk.tokens[first + i], target = p.targets[token];
      if (target >= word && target < word + words) p.loss[token] = row[target - word];  // waits here until step 2
    }
  });
}

template <class T>
void losses(const LinearCrossEntropyParams& p, const Chunk<T>& chunk, int64_t vocab_blocks, const Parallel& par) {
  parallel_ranges(par, chunk.size, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float *tops = chunk.stats + i * 3 * vocab_blocks, *sums = tops + vocab_blocks,
                  *totals = sums + vocab_blocks;
      float top = tops[0];
      for (int64_t b = 1; b < vocab_blocks; ++b) top = tops[b] > top ? tops[b] : top;
      vf sum = zero(), total = zero();
      for (int64_t b = 0; b < vocab_blocks; b += kLanes) {
        const int64_t n = vocab_blocks - b;
        const vf share = exp2_nonpositive((load_n(tops + b, n) - top) * kLog2e);  // anything in the lanes beyond n
        sum = fma(load_n(sums + b, n), iota() < static_cast<int32_t>(at_most(n, kLanes)) ? share : zero(), sum);
        total += load_n(totals + b, n);
      }
      const int64_t token = chunk.tokens[i];
      const float lse = top + __builtin_logf(reduce_sum(sum)), target = p.loss[token];
      float loss = lse - target;
      if (p.label_smoothing != 0.f)
        loss += p.label_smoothing * (target - reduce_sum(total) / static_cast<float>(p.vocab));
      p.lse[token] = lse;
      p.loss[token] = loss + p.z_loss * lse * lse;
    }
  });
}

template <class T>
void run(const LinearCrossEntropyParams& p, const Parallel& par) {
  using G = typename GemmProduct<T, T>::type::Value;
  constexpr int64_t kGradientStride = kTileStride * sizeof(float) / sizeof(G);
  const T* weight = static_cast<const T*>(p.weight);
  const bool gradients = p.dhidden || p.dweight;
  // Small vocabularies are cut finer, so that there is work for every thread.
  const int64_t vocab_block = p.vocab >= 2 * par.threads * kMaxVocabBlock ? kMaxVocabBlock : kMinVocabBlock;
  const int64_t vocab_blocks = blocks(p.vocab, vocab_block);
  int64_t chunk_size = kMaxChunk;
  if (gradients && chunk_size * p.vocab > kChunkLogits) chunk_size = kChunkLogits / p.vocab;
  if (chunk_size > kBlockM) chunk_size -= chunk_size % kBlockM;  // no small remainder for every block of the weight
  if (chunk_size < kMinChunk) chunk_size = kMinChunk;
  if (chunk_size > p.count) chunk_size = p.count;
  const bool adjacent = p.count == 0 || p.tokens[p.count - 1] - p.tokens[0] == p.count - 1;

  GemmWorkers workers(par.threads, kTokenBlock * kTileStride);
  Scratch<float> tiles(gradients ? vocab_blocks * chunk_size * kTileStride : 0);
  Scratch<float> stats(chunk_size * 3 * vocab_blocks);
  Scratch<T> gathered(adjacent ? 0 : chunk_size * p.dim);
  constexpr bool kDirect = sizeof(T) == sizeof(float);  // dweight is its own float sum
  Scratch<float> dweight_sum(p.dweight && !kDirect ? p.vocab * p.dim : 0);
  float* dweight = kDirect ? static_cast<float*>(p.dweight) : dweight_sum.data();

  for (int64_t begin = 0; begin < p.count; begin += chunk_size) {
    Chunk<T> chunk{
        at_most(p.count - begin, chunk_size), p.tokens + begin, {}, gradients ? tiles.data() : nullptr, stats.data()};
    const T* rows = static_cast<const T*>(p.hidden);
    if (adjacent) {
      chunk.hidden = {rows + chunk.tokens[0] * p.hidden_stride, p.hidden_stride, 1};
    } else {
      chunk.hidden = {gathered.data(), p.dim, 1};
      for (int64_t i = 0; i < chunk.size; ++i)
        __builtin_memcpy(gathered.data() + i * p.dim, rows + chunk.tokens[i] * p.hidden_stride, p.dim * sizeof(T));
    }
    scores(p, chunk, vocab_block, workers, par);
    if (p.loss) losses(p, chunk, vocab_blocks, par);
    if (!gradients) continue;

    parallel_tasks(par, vocab_blocks, [&](int64_t block, int64_t worker) {
      const int64_t word = block * vocab_block, words = at_most(p.vocab - word, vocab_block);
      float* tile = chunk.tiles + block * chunk.size * kTileStride;
      for (int64_t i = 0; i < chunk.size; ++i) {
        const int64_t token = chunk.tokens[i];
        const float dloss = p.dloss ? p.dloss[token] : p.dloss_of_all;
        differentiate<G>(tile + i * kTileStride, words, p.targets[token] - word, RowGradient(p, dloss, p.lse[token]));
      }
      if (p.dweight)
        gemm(words, p.dim, chunk.size, Matrix<G>{reinterpret_cast<const G*>(tile), 1, kGradientStride}, chunk.hidden,
             dweight + word * p.dim, p.dim, begin > 0, workers.packing(worker));
    });
    if (!p.dhidden) continue;
    const int64_t dim_blocks = blocks(p.dim, kDimBlock);
    parallel_tasks(par, blocks(chunk.size, kBlockM) * dim_blocks, [&](int64_t task, int64_t worker) {
      const int64_t first = task / dim_blocks * kBlockM, rows_here = at_most(chunk.size - first, kBlockM);
      const int64_t column = task % dim_blocks * kDimBlock, columns = at_most(p.dim - column, kDimBlock);
      float* sum = workers.tile(worker);
      for (int64_t block = 0; block < vocab_blocks; ++block) {
        const float* tile = chunk.tiles + (block * chunk.size + first) * kTileStride;
        gemm(rows_here, columns, at_most(p.vocab - block * vocab_block, vocab_block),
             Matrix<G>{reinterpret_cast<const G*>(tile), kGradientStride, 1},
             Matrix<T>{weight + block * vocab_block * p.weight_stride + column, p.weight_stride, 1}, sum, columns,
             block > 0, workers.packing(worker));
      }
      for (int64_t i = 0; i < rows_here; ++i)
        store_row(static_cast<T*>(p.dhidden) + chunk.tokens[first + i] * p.dim + column, sum + i * columns, columns);
    });
  }
  if (p.dweight && !kDirect && p.count > 0)
    parallel_ranges(par, p.vocab, 1 + 16384 / p.dim, [&](int64_t begin, int64_t end) {
      store_row(static_cast<T*>(p.dweight) + begin * p.dim, dweight + begin * p.dim, (end - begin) * p.dim);
    });
}

}  // namespace

void linear_cross_entropy(const LinearCrossEntropyParams& p, const Parallel& par) {
  LLMCORE_DISPATCH_FLOAT(p.dtype, T, run<T>(p, par))
}

}  // namespace LLMCORE_ISA
}  // namespace cpu
}  // namespace llmcore
