// The integer arithmetic of codes, for one element: shared by the loops of the CPU targets and by GPU
// threads. The formulas stand in ds/codes.h.

// [Note: random numbers by index] The random number of an element is a function of the seed and of its index:
// a multiplicative hash, then the finaliser "lowbias32" (Wellons 2018). So it does not depend on how a tensor
// is cut into tasks, and nothing must be saved to repeat a step.
DS_INLINE std::uint32_t random_word(std::uint32_t index, std::uint32_t key) {
  std::uint32_t word = index * 0x9E3779B1u + key;
  word ^= word >> 16;
  word *= 0x7FEB352Du;
  word ^= word >> 15;
  word *= 0x846CA68Bu;
  return word ^ (word >> 16);
}

// The key of the elements of a block: from the seed, and from the upper half of the index of its first
// element.
DS_INLINE std::uint32_t random_key(std::uint64_t seed, std::int64_t begin) {
  const auto high = static_cast<std::uint32_t>(static_cast<std::uint64_t>(begin) >> 32);
  const auto seed_high = static_cast<std::uint32_t>(seed >> 32);
  return high * 0xC2B2AE35u + (static_cast<std::uint32_t>(seed) ^ (seed_high * 0x85EBCA6Bu));
}

// A random number in [0, 1), a multiple of 2^-24.
DS_INLINE float uniform_of(std::uint32_t word) {
  return static_cast<float>(static_cast<std::int32_t>(word >> 8)) * 0x1p-24f;
}

// Adding 1.5 * 2^23 places the last bit of the sum at 1, so that the addition itself rounds to nearest even.
constexpr float kRound = 12582912.0f;
constexpr std::uint32_t kRoundBits = 0x4B400000;

// From the bits of x + kRound to the integer nearest to x, within [-levels, levels].
DS_INLINE std::int32_t rounded(std::uint32_t sum, std::int32_t levels) {
  const auto nearest = static_cast<std::int32_t>(sum - kRoundBits);
  const std::int32_t most = nearest < levels ? nearest : levels;
  return most > -levels ? most : -levels;
}
