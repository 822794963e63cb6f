// Cutting a list of tensors into chunks of work: pure arithmetic.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

namespace ds {

// The tensors laid end to end, cut every chunk_numel elements. A cut inside a tensor is moved down to a
// multiple of kCutNumel elements of that tensor, so that a chunk never starts inside a cache line that the
// tensor's start does not split. Kernels must not depend on where the cuts are.
class ChunkPlan {
 public:
  static constexpr std::int64_t kCutNumel = 64;

  ChunkPlan(std::span<const std::int64_t> numels, std::int64_t chunk_numel);

  std::int64_t num_chunks() const { return num_chunks_; }

  // Calls visit(tensor, begin, numel) for each piece of the chunk; numel > 0.
  template <class Visit>
  void pieces(std::int64_t chunk, Visit visit) const {
    std::int64_t at = cut(chunk);
    const std::int64_t end = cut(chunk + 1);
    for (std::size_t tensor = owner(at); at < end; ++tensor) {
      const std::int64_t stop = std::min(end, starts_[tensor + 1]);
      if (stop > at) visit(tensor, at - starts_[tensor], stop - at);
      at = std::max(at, stop);
    }
  }

 private:
  std::size_t owner(std::int64_t position) const;  // the tensor that holds the position
  std::int64_t cut(std::int64_t chunk) const;      // where the chunk starts

  std::vector<std::int64_t> starts_;  // one more than tensors
  std::int64_t chunk_numel_;
  std::int64_t num_chunks_;
};

}  // namespace ds
