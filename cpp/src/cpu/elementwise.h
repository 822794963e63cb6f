// Running an element-wise kernel over a list of tensors.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "dispatch/chunks.h"
#include "dispatch/kernel_table.h"
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

// An optimizer with one state at most; `table` is its part of the kernel table.
template <class Scalars, std::size_t kNumStates>
void one_state_step(const Scalars& scalars,
                    const OneStateFn<Scalars> (&table)[kNumStates][kNumDTypes][kNumOutKinds],
                    std::span<const UpdateTensor> tensors, int num_threads) {
  for_each_piece(tensors, num_threads, [&](const UpdateTensor& t, std::int64_t begin, std::int64_t numel) {
    const int state = t.states[0] == nullptr ? kNumStateKinds : state_kind(t.state_dtype);
    const OneStateFn<Scalars> fn = table[state][grad_kind(t.grad_dtype)][out_kind(t.out, t.out_dtype)];
    fn(scalars, t.param + begin, at(t.states[0], t.state_dtype, begin), at(t.grad, t.grad_dtype, begin),
       at(t.out, t.out_dtype, begin), numel);
  });
}

}  // namespace ds
