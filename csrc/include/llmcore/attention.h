// Scaled dot-product attention by tiles (FlashAttention, arXiv 2205.14135 and 2307.08691), dense, packed or paged.
#pragma once
#include "llmcore/cuda.h"
#include "llmcore/dtype.h"
#include "llmcore/isa.h"

namespace llmcore {

// Where a tensor's element (batch or block, row, head, 0) lies, in elements. The last dimension is contiguous.
struct RowStrides {
  int64_t batch, row, head;
};

// Which scores are taken, and how they are formed. Masks are bottom-right aligned: query i of num_q stands at key
// i + num_k - num_q.
struct AttentionMask {
  float scale;    // scores = q.k * scale
  float softcap;  // then softcap * tanh(scores / softcap); 0: none
  bool causal;
  int64_t window;      // |key - position| < window; 0: none
  const float* sinks;  // (heads): one more score per row whose value is nothing; or null
  // (heads, 2 * bias_reach + 1), CPU only, or null: added to the scores, a key d places after the query's taking column
  // d + bias_reach, one farther away the first or last. Not with a softcap.
  const float* position_bias;
  int64_t bias_reach;
  // bool (batch or 1, heads or 1, blocks_q, blocks_k), 0 strides where 1; or null
  const uint8_t* block_mask;
  int64_t mask_batch, mask_head, mask_row;  // strides; keys contiguous
  int64_t block_q, block_k;                 // tokens per block
};

// A call's tensors. Dense: sequence b has seq_q queries and seq_k keys. Packed (cu_q, cu_k not null): sequence b's
// queries are rows cu_q[b] .. cu_q[b + 1] of q, its keys rows cu_k[b] .. cu_k[b + 1]; batch strides are 0. Paged
// (block_table not null): k and v are caches, key j of sequence b is in block block_table[b][j / block_size], slot
// j % block_size; k_strides.batch is the stride of a block; kv_lens[b] keys. Every id has been checked by the binding.
struct AttentionShape {
  int64_t batch, heads, kv_heads;  // kv_heads divides heads
  int64_t head_dim, v_head_dim;    // of q and k; of v and out
  int64_t seq_q, seq_k;
  int64_t total_q;      // query rows in all, packed or not: bounds a grid where cu_q is on the device
  int64_t total_k;      // the same for keys (0 when paged)
  const int32_t* cu_q;  // (batch + 1) or null
  const int32_t* cu_k;
  const int32_t* block_table;  // (batch, table_stride) or null
  int64_t table_stride, block_size;
  const int32_t* kv_lens;  // (batch), with block_table
};

struct AttentionParams {
  AttentionShape shape;
  AttentionMask mask;
  DType q_dtype, kv_dtype;  // out has q_dtype; kv_dtype may differ (and be of 8 bits) when paged
  const void* q;
  const void* k;
  const void* v;
  RowStrides q_strides, k_strides, v_strides;
  const float* k_scale;  // (num_blocks, block_size, kv_heads) for caches of 8 bits, or null
  const float* v_scale;
  void* out;
  RowStrides out_strides;
  float* lse;  // log of each row's sum of exponentials; row stride 1; or null
  int64_t lse_batch, lse_head;
  void* workspace;  // CUDA: attention_forward_workspace() bytes, aligned to 16; CPU: null
};

// Gradients. On the CPU, and on CUDA when `deterministic`, each worker owns what it adds to, and partial sums meet in a
// fixed order.
struct AttentionBackwardParams {
  AttentionShape shape;
  AttentionMask mask;
  DType dtype;
  const void* q;
  const void* k;
  const void* v;
  const void* out;
  const void* dout;
  RowStrides q_strides, k_strides, v_strides, out_strides, dout_strides;
  const float* lse;   // as in AttentionParams
  const float* dlse;  // lse's layout, or null
  int64_t lse_batch, lse_head;
  void* dq;
  void* dk;
  void* dv;
  RowStrides dq_strides, dk_strides, dv_strides;
  float* dsinks;       // (batch, heads), zeroed, or null
  float* dbias;        // (batch, heads, 2 * bias_reach + 1), zeroed, or null
  bool deterministic;  // CUDA: dq has the same bits in every run; else its sums' order is open
  void* workspace;     // CUDA: attention_backward_workspace() bytes, aligned to 16; CPU: null
};

LLMCORE_CPU_KERNEL_BF16(attention_forward, AttentionParams)
LLMCORE_CPU_KERNEL_BF16(attention_backward, AttentionBackwardParams)
LLMCORE_CUDA_KERNEL(attention_forward, AttentionParams)
LLMCORE_CUDA_KERNEL(attention_backward, AttentionBackwardParams)

namespace cuda {
// Bytes of device memory that the launcher needs for a call, computed from the shapes alone.
int64_t attention_forward_workspace(const AttentionParams& p, const Device& device);
int64_t attention_backward_workspace(const AttentionBackwardParams& p, const Device& device);
}  // namespace cuda

}  // namespace llmcore
