// Sums of squares in fixed blocks: the same bits for any number of threads and any CPU target.
#pragma once

#include <cstdint>
#include <span>

#include "ds/dtype.h"

namespace ds {

struct NormTensor {
  const void* data;
  std::int64_t numel;
  DType dtype;
};

struct SquaredNorm {
  double sum;
  bool finite;  // false when an element is inf or NaN
};

// Elements per block of squared_norm. Part of the result's definition: changing it changes last bits.
inline constexpr std::int64_t kNormBlock = 16 * 1024;

// The fp64 sum of squares of all elements: blocks of kNormBlock from each tensor's start, added in order.
SquaredNorm squared_norm(std::span<const NormTensor> tensors, int num_threads);

// out[i] = sum of squares of elements [i * block_numel, (i + 1) * block_numel); block_numel > 0.
void squared_norm_blocks(const NormTensor& tensor, std::int64_t block_numel, double* out, int num_threads);

}  // namespace ds
