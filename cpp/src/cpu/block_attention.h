// What the kernels of the CPU targets get for one block row.
#pragma once

#include <cstdint>

namespace ds {

struct BlockAttentionRow {
  const float* q;     // (block, dim) of this row
  const float* kt;    // (rows, dim, block) of the key head: transposed blocks
  const float* v;     // (rows, block, dim) of the key head
  const float* bias;  // (tokens) of the sample, or null
  const std::int64_t* columns;
  std::int64_t num_columns;
  std::int64_t row;
  float* inverse_sums;  // (block): 1 / sum of exp(score - maximum)
};

struct BlockAttentionRowGrads {
  const float* out;   // (block, dim)
  const float* grad;  // (block, dim)
  const float* lse;   // (block)
  const float* k;     // (rows, block, dim)
  const float* vt;    // (rows, dim, block)
  float* dq;          // (block, dim)
  float* dk;          // (rows, block, dim)
  float* dv;          // (rows, block, dim)
};

}  // namespace ds
