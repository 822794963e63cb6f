#include "ds/norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/elementwise.h"
#include "dispatch/kernel_table.h"

namespace ds {
namespace {

std::int64_t num_blocks(std::int64_t numel, std::int64_t block_numel) {
  return (numel + block_numel - 1) / block_numel;
}

double block_sum(const KernelTable& table, const NormTensor& t, std::int64_t begin, std::int64_t numel) {
  return table.sum_squares[static_cast<int>(t.dtype)](at(t.data, t.dtype, begin), numel);
}

}  // namespace

SquaredNorm squared_norm(std::span<const NormTensor> tensors, int num_threads) {
  const std::vector<Block> blocks = norm_blocks(tensors);
  std::vector<double> sums(blocks.size());
  const KernelTable& table = kernels();
  parallel_for(static_cast<std::int64_t>(blocks.size()), num_threads, [&](std::int64_t i) {
    const Block& block = blocks[static_cast<std::size_t>(i)];
    sums[static_cast<std::size_t>(i)] = block_sum(table, tensors[block.tensor], block.begin, block.numel);
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  // The largest fp32 number squared is 1.2e77: only an inf or a NaN among the elements makes an fp64 sum
  // overflow.
  return {total, std::isfinite(total)};
}

void squared_norm_blocks(const NormTensor& tensor, std::int64_t block_numel, double* out, int num_threads) {
  const std::int64_t blocks = num_blocks(tensor.numel, block_numel);
  const std::int64_t per_chunk = std::max<std::int64_t>(1, kNormBlock / block_numel);
  const KernelTable& table = kernels();
  parallel_for(num_blocks(blocks, per_chunk), num_threads, [&](std::int64_t chunk) {
    const std::int64_t end = std::min(blocks, (chunk + 1) * per_chunk);
    for (std::int64_t i = chunk * per_chunk; i < end; ++i) {
      const std::int64_t begin = i * block_numel;
      out[i] = block_sum(table, tensor, begin, std::min(block_numel, tensor.numel - begin));
    }
  });
}

}  // namespace ds
