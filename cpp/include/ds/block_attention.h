// Attention over some blocks of the attention matrix: forward and backward, without the matrix. Tensors are
// fp32, bf16 or fp16; scores, weights and sums are fp32.
#pragma once

#include <cstdint>

#include "ds/dtype.h"

namespace ds {

// Tensors are contiguous: q, out and their gradients (batch, heads, tokens, dim); k, v and theirs (batch,
// kv_heads, tokens, dim), all of one dtype; lse (batch, heads, tokens) fp32. Each key head serves heads /
// kv_heads query heads.
struct BlockAttention {
  const void* q;
  const void* k;
  const void* v;
  const float* bias;  // (batch, tokens), added to the scores of each key; null: nothing is added
  std::int64_t batch;
  std::int64_t heads;
  std::int64_t kv_heads;
  std::int64_t rows;   // block rows: tokens / block
  std::int64_t block;  // a multiple of 16
  std::int64_t dim;    // a multiple of 16
  float scale;
  bool causal;  // in blocks on the diagonal, only the lower triangle counts
  // Blocks of row r of head h: columns[offsets[h * rows + r]] to columns[offsets[h * rows + r + 1] - 1].
  const std::int64_t* offsets;
  const std::int64_t* columns;
  DType dtype = DType::kF32;
};

struct BlockAttentionGrads {
  const void* out;
  const float* lse;
  const void* grad;  // of out
  void* dq;
  void* dk;  // fp32: zero at first
  void* dv;  // fp32: zero at first
};

// Writes out and the log-sum-exp of the scores of each query. Bits do not depend on the number of threads.
// Keys and values of 16 bits are widened once, to 8 bytes for each element of k.
void block_attention_forward(const BlockAttention& job, void* out, float* lse, int num_threads);

// One thread computes all rows of the query heads of a key head, so that sums have one order.
void block_attention_backward(const BlockAttention& job, const BlockAttentionGrads& grads, int num_threads);

}  // namespace ds
