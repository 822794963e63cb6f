// Running an element-wise kernel over a list of tensors.
#pragma once

#include <algorithm>
#include <atomic>
#include <span>
#include <vector>

#include "dispatch/chunks.h"
#include "dispatch/kernel_table.h"
#include "ds/checksum.h"
#include "ds/formats.h"
#include "ds/parallel.h"
#include "ds/update.h"

namespace ds {

// Small enough that the last chunks of the threads end together, large enough that taking one costs nothing
// and, for tensors in memory, that the hardware's prefetchers seldom start anew. A multiple of 64.
inline std::int64_t elementwise_chunk(std::int64_t numel, int num_threads) {
  constexpr std::int64_t kSmallest = 32 * 1024;
  constexpr std::int64_t kLargest = 256 * 1024;
  return std::clamp(numel / (32 * std::max(num_threads, 1)) / 64 * 64, kSmallest, kLargest);
}

// Calls range(tensor, begin, numel) for pieces that cover every element once.
template <class Tensor, class Range>
void for_each_piece(std::span<const Tensor> tensors, int num_threads, Range range) {
  std::vector<std::int64_t> numels;
  numels.reserve(tensors.size());
  std::int64_t total = 0;
  for (const Tensor& tensor : tensors) {
    numels.push_back(tensor.numel);
    total += tensor.numel;
  }
  const ChunkPlan plan(numels, elementwise_chunk(total, num_threads));
  parallel_for(plan.num_chunks(), num_threads, [&](std::int64_t chunk) {
    plan.pieces(chunk, [&](std::size_t index, std::int64_t begin, std::int64_t numel) {
      range(tensors[index], begin, numel);
    });
  });
}

// The address of an element behind a pointer whose type is known at run time only; null stays null.
inline void* at(void* base, DType dtype, std::int64_t index) {
  return base == nullptr ? nullptr
                         : static_cast<char*>(base) + static_cast<std::size_t>(index) * size_of(dtype);
}
inline const void* at(const void* base, DType dtype, std::int64_t index) {
  return at(const_cast<void*>(base), dtype, index);
}

// The checksums of the rows of UpdateSums over one range of elements.
struct RowSums {
  std::uint64_t row[5];

  void add(ChecksumFn fn, const UpdateTensor& t, const TensorFormat& format, std::int64_t begin,
           std::int64_t numel, bool with_grad) {
    auto sum = [&](const void* base, DType dtype) {
      const auto width = static_cast<std::int64_t>(size_of(dtype));
      return fn(at(base, dtype, begin), begin % kChecksumBlock * width / 4, numel * width);
    };
    if (with_grad) row[0] += sum(t.grad, t.grad_dtype);
    row[1] += sum(t.param, format.param_dtype);
    int next = 2;
    for (void* state : t.states) {
      if (state != nullptr) row[next++] += sum(state, t.state_dtype);
    }
    if (format.low != nullptr) row[next] += sum(format.low, DType::kBF16);  // of the same width
  }
  // Two chunks may share a block.
  void add_to(std::uint64_t* sums, std::int64_t stride, std::int64_t block, int first_row,
              int num_rows) const {
    for (int i = first_row; i < num_rows; ++i) {
      std::atomic_ref(sums[i * stride + block]).fetch_add(row[i], std::memory_order_relaxed);
    }
  }
};

// [Note: checksums in the pass] Calls update for ranges of kTile elements. The checksums of what it will read
// are computed right before, those of what it has written right after: the range is in the L1 cache by then,
// so that they need no traffic with memory. The kernels are those of an update without checksums, and so are
// the bits.
template <class Update>
void update_with_sums(ChecksumFn fn, const UpdateTensor& t, const TensorFormat& format,
                      const UpdateSums& sums, std::int64_t begin, std::int64_t numel, Update update) {
  constexpr std::int64_t kTile = 512;
  static_assert(kChecksumBlock % kTile == 0);
  const std::int64_t end = begin + numel;
  const std::int64_t stride = num_checksums(t.numel);
  const int rows = num_sum_rows(t, format);
  while (begin < end) {
    const std::int64_t block = begin / kChecksumBlock;
    const std::int64_t stop = std::min(end, (block + 1) * kChecksumBlock);
    RowSums read{}, written{};
    while (begin < stop) {
      const std::int64_t n = std::min(kTile, stop - begin);
      read.add(fn, t, format, begin, n, true);
      update(t, begin, n);
      written.add(fn, t, format, begin, n, false);
      begin += n;
    }
    read.add_to(sums.read, stride, block, 0, rows);
    written.add_to(sums.written, stride, block, 1, rows);
  }
}

}  // namespace ds
