// Signs to bits and back. Included per target.

template <class T>
double pack_signs_range(const void* x, std::uint8_t* bits, std::int64_t numel) {
  Sum16 sum = zero16();
  std::int64_t byte = 0;
  by_sixteen(static_cast<const T*>(x), numel, [&](const T* group) {
    add_magnitudes(sum, widen16(group));
    unsigned mask = 0;
    for (int lane = 0; lane < 16; lane += kLanes) mask |= sign_bits(load(group + lane)) << lane;
    const std::int64_t left = (numel + 7) / 8 - byte;
    bits[byte] = static_cast<std::uint8_t>(mask);
    if (left > 1) bits[byte + 1] = static_cast<std::uint8_t>(mask >> 8);
    byte += 2;
  });
  return tree_sum(sum);
}

template <class T>
void unpack_signs_range(const std::uint8_t* bits, float scale, void* out, std::int64_t numel) {
  auto* to = static_cast<T*>(out);
  const F32 plus = set(scale);
  const F32 minus = set(-scale);
  for (std::int64_t i = 0; i < numel; i += 16) {
    const std::int64_t n = numel - i < 16 ? numel - i : 16;
    const unsigned mask = bits[i / 8] | (n > 8 ? static_cast<unsigned>(bits[i / 8 + 1]) << 8 : 0u);
    T group[16];
    T* target = n == 16 ? to + i : group;
    for (int lane = 0; lane < 16; lane += kLanes) store(target + lane, select(mask >> lane, minus, plus));
    if (n == 16) continue;
    for (std::int64_t j = 0; j < n; ++j) to[i + j] = group[j];
  }
}
