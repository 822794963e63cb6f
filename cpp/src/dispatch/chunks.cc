#include "dispatch/chunks.h"

namespace ds {

ChunkPlan::ChunkPlan(std::span<const std::int64_t> numels, std::int64_t chunk_numel)
    : chunk_numel_(chunk_numel) {
  starts_.reserve(numels.size() + 1);
  starts_.push_back(0);
  for (const std::int64_t numel : numels) starts_.push_back(starts_.back() + numel);
  num_chunks_ = (starts_.back() + chunk_numel - 1) / chunk_numel;
}

std::size_t ChunkPlan::owner(std::int64_t position) const {
  const auto after = std::upper_bound(starts_.begin(), starts_.end(), position);
  return static_cast<std::size_t>(after - starts_.begin()) - 1;
}

std::int64_t ChunkPlan::cut(std::int64_t chunk) const {
  const std::int64_t position = chunk * chunk_numel_;
  if (position >= starts_.back()) return starts_.back();
  const std::int64_t offset = position - starts_[owner(position)];
  return position - offset % kCutNumel;
}

}  // namespace ds
