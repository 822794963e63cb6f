// Attention over some blocks of the attention matrix, in fp32: forward and backward, without the matrix.
#pragma once

#include <cstdint>

namespace ds {

// Tensors are contiguous: q, out and their gradients (batch, heads, tokens, dim); k, v and theirs (batch,
// kv_heads, tokens, dim); lse (batch, heads, tokens). Each key head serves heads / kv_heads query heads.
struct BlockAttention {
  const float* q;
  const float* k;
  const float* v;
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
};

struct BlockAttentionGrads {
  const float* out;
  const float* lse;
  const float* grad;  // of out
  float* dq;
  float* dk;  // zero at first
  float* dv;  // zero at first
};

// Writes out and the log-sum-exp of the scores of each query. Bits do not depend on the number of threads.
void block_attention_forward(const BlockAttention& job, float* out, float* lse, int num_threads);

// One thread computes all rows of the query heads of a key head, so that sums have one order.
void block_attention_backward(const BlockAttention& job, const BlockAttentionGrads& grads, int num_threads);

}  // namespace ds
