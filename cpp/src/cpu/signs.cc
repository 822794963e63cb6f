#include "ds/signs.h"

#include <algorithm>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/elementwise.h"

namespace ds {

double pack_signs(const void* x, DType dtype, std::int64_t numel, std::uint8_t* bits, int num_threads) {
  const NormTensor tensor{x, numel, dtype};
  const std::vector<Block> blocks = norm_blocks(std::span(&tensor, 1));
  std::vector<double> sums(blocks.size());
  const PackSignsFn fn = kernels().pack_signs[static_cast<int>(dtype)];
  parallel_for(static_cast<std::int64_t>(blocks.size()), num_threads, [&](std::int64_t i) {
    const Block& block = blocks[static_cast<std::size_t>(i)];  // starts at a multiple of 8 elements
    sums[static_cast<std::size_t>(i)] = fn(at(x, dtype, block.begin), bits + block.begin / 8, block.numel);
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

void unpack_signs(const std::uint8_t* bits, float scale, void* out, DType dtype, std::int64_t numel,
                  int num_threads) {
  const UnpackSignsFn fn = kernels().unpack_signs[static_cast<int>(dtype)];
  const std::int64_t chunk_numel = elementwise_chunk(numel, num_threads);
  const std::int64_t chunks = (numel + chunk_numel - 1) / chunk_numel;
  parallel_for(chunks, num_threads, [&](std::int64_t chunk) {
    const std::int64_t begin = chunk * chunk_numel;
    fn(bits + begin / 8, scale, at(out, dtype, begin), std::min(chunk_numel, numel - begin));
  });
}

}  // namespace ds
