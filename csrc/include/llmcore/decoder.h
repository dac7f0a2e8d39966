// The layers of a decoder as one call, for the few tokens of a decode step: there, what Python and the dispatcher take
// per op is as much as the kernels do. It runs the very kernels that llmcore/models/transformer.py reaches op by op, in
// the same order, and so gives the same bits.
#pragma once
#include <cstddef>
#include <vector>

#include "llmcore/dtype.h"
#include "llmcore/glu.h"
#include "llmcore/parallel.h"
#include "llmcore/quantized_linear.h"

namespace llmcore {

// Rows of a matrix: in blocks of `format`, packed, or dense in the model's dtype.
struct MatrixPart {
  bool quantized;
  QuantFormat format;
  int64_t rows;
  const void* weight;
};

// y = x W^T + bias, W of (n, k), its rows in parts one below the other: a single one unless they are quantised.
struct Matrix {
  int64_t n, k;
  const void* bias;  // (n) or null
  std::vector<MatrixPart> parts;
};

// Pre-norm layers (or with norms of what they add, too) of grouped-query attention and a gated feed-forward layer.
struct DecoderSizes {
  DType dtype;        // of weights, activations
  DType cache_dtype;  // of the caches, one of the three floats
  int64_t dim, num_heads, num_kv_heads, head_dim, ffn_dim, rotary_dim;
  int64_t block_size, num_blocks;  // of the caches, (num_blocks, block_size, num_kv_heads, head_dim), contiguous
  int64_t max_positions;           // rows of cos and sin
  bool interleaved;
  float norm_eps, scale, softcap;  // as in AttentionMask
  Activation activation;
  const void* last_norm;  // (dim)
};

struct DecoderLayer {
  const void *attention_norm, *mlp_norm;          // (dim) gains of RMS norms
  const void *attention_out_norm, *mlp_out_norm;  // (dim), of what is added to the stream; or null
  Matrix qkv, out, gate_up, down;
  const void *q_norm, *k_norm;  // (head_dim) or null
  const float *cos, *sin;       // (max_positions, rotary_dim / 2); null: this layer does not rotate
  int64_t window;               // 0: none
  const float* sinks;           // (num_heads) or null
  void *k_cache, *v_cache;
};

// `tokens` of `batch` sequences, packed; as in AttentionShape's paged form.
struct DecoderStep {
  int64_t tokens, batch;
  const void* x;             // (tokens, dim): their embeddings
  const int64_t* positions;  // (tokens)
  const int64_t* slots;      // (tokens)
  const int32_t* block_table;
  int64_t table_stride;
  const int32_t* kv_lens;  // (batch)
  const int32_t* cu_q;     // (batch + 1); null: one token each
  void* out;               // (tokens, dim), after the last norm
};

class Decoder {
 public:
  explicit Decoder(const DecoderSizes& sizes) : sizes_(sizes) {}
  void add_layer(const DecoderLayer& layer) { layers_.push_back(layer); }
  // Throws, before anything is written, for a position, slot, length or block out of its range. Not for two threads at
  // a time: scratch is kept between calls.
  void step(const DecoderStep& s, const Parallel& par);

 private:
  struct Buffers;
  void check(const DecoderStep& s) const;
  void attention(const DecoderLayer& layer, const DecoderStep& s, const Buffers& b, const Parallel& par) const;
  void mlp(const DecoderLayer& layer, int64_t tokens, const Buffers& b, const Parallel& par) const;

  DecoderSizes sizes_;
  std::vector<DecoderLayer> layers_;
  std::vector<std::byte> scratch_;
};

}  // namespace llmcore
