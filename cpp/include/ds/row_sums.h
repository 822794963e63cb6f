// Sums of rows that are chosen by index, with weights, and their gradients: how the outputs of experts become
// those of tokens. Nothing is added to memory that another row may add to, so sums have one order.
#pragma once

#include <cstdint>

#include "ds/dtype.h"

namespace ds {

// Tensors are contiguous, all of one dtype, fp32 or bf16.
struct RowSums {
  const std::int64_t* index;  // (sums, choices): rows; num_rows stands for no row
  std::int64_t sums;
  std::int64_t choices;
  std::int64_t num_rows;
  std::int64_t columns;  // a multiple of 16
  DType dtype;
};

// out[s] = sum over k of weights[s, k] rows[index[s, k]], for rows (num_rows, columns) and weights (sums,
// choices) or null, which stands for ones. Each element is a chain of multiply-adds in fp32 from 0 in the
// order of k, rounded once to the dtype: the error is at most k u / (1 - k u) times the sum of magnitudes, u
// = 2^-24.
void row_sums(const RowSums& job, const void* rows, const void* weights, void* out, int num_threads);

// From grad (sums, columns), the gradient of out: drows[index[s, k]] = weights[s, k] grad[s], and dweights[s,
// k] = the product of grad[s] and rows[index[s, k]], 0 without a row. No row may have two places in the
// index; rows without one are not written. A product of `columns` terms is added to 16 sums by index modulo
// 16, which are then added in order.
void row_sums_grad(const RowSums& job, const void* grad, const void* rows, const void* weights, void* drows,
                   void* dweights, int num_threads);

}  // namespace ds
