// The fixed blocks over which sums are taken (ds/norm.h).
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "ds/norm.h"

namespace ds {

struct Block {
  std::size_t tensor;
  std::int64_t begin;
  std::int64_t numel;
};

// The blocks of kNormBlock elements of each tensor, in order.
template <class Tensor>
std::vector<Block> norm_blocks(std::span<const Tensor> tensors) {
  std::vector<Block> blocks;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    for (std::int64_t begin = 0; begin < tensors[i].numel; begin += kNormBlock) {
      blocks.push_back({i, begin, std::min(kNormBlock, tensors[i].numel - begin)});
    }
  }
  return blocks;
}

}  // namespace ds
