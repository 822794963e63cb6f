// [Note: checksum of a block] (ds/checksum.h). Included per target.

// The words of `bytes` bytes, the first of which is word `first` of its block.
inline std::uint64_t checksum(const void* data, std::int64_t first, std::int64_t bytes) {
  constexpr std::int64_t kGroup = 16 * 4;
  const auto* at = static_cast<const unsigned char*>(data);
  WeightedWords sum = zero_words((2 * static_cast<std::uint32_t>(first) + 1) * kChecksumFactor);
  for (; bytes >= kGroup; bytes -= kGroup, at += kGroup) add_words(sum, at);
  if (bytes > 0) {
    unsigned char tail[kGroup] = {};
    for (std::int64_t i = 0; i < bytes; ++i) tail[i] = at[i];
    add_words(sum, tail);
  }
  return total(sum);
}
