#include "ds/checksum.h"

#include "cpu/elementwise.h"
#include "dispatch/kernel_table.h"

namespace ds {

void checksums(std::span<const ChecksumTensor> tensors, int num_threads) {
  const ChecksumFn fn = kernels().checksum;
  std::vector<std::int64_t> starts{0};  // of each tensor, in blocks
  starts.reserve(tensors.size() + 1);
  for (const ChecksumTensor& t : tensors) starts.push_back(starts.back() + num_checksums(t.numel));
  constexpr std::int64_t kPerChunk = 16;
  const std::int64_t all = starts.back();
  // Chunks of whole blocks: each number is written by one thread.
  parallel_for((all + kPerChunk - 1) / kPerChunk, num_threads, [&](std::int64_t chunk) {
    const std::int64_t end = std::min(all, (chunk + 1) * kPerChunk);
    std::int64_t at = chunk * kPerChunk;
    auto i =
        static_cast<std::size_t>(std::upper_bound(starts.begin(), starts.end(), at) - starts.begin()) - 1;
    for (; at < end; ++at) {
      while (at >= starts[i + 1]) ++i;
      const ChecksumTensor& t = tensors[i];
      const std::int64_t block = at - starts[i];
      const std::int64_t begin = block * kChecksumBlock;
      const std::int64_t numel = std::min(kChecksumBlock, t.numel - begin);
      t.sums[block] =
          fn(ds::at(t.data, t.dtype, begin), 0, numel * static_cast<std::int64_t>(size_of(t.dtype)));
    }
  });
}

}  // namespace ds
