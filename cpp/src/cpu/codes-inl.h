// Blocks of values to codes of 1, 4 or 8 bits and back. Included per target.
//
// The values of a block are first widened to an array that stays in the L1 cache, because its scale must be
// known before the first code. Loops over 32-bit integers are left to the compiler, which vectorises them for
// each target: no sum of floats is among them whose order could change.

constexpr std::int64_t padded16(std::int64_t numel) { return (numel + 15) / 16 * 16; }

// v = x + residual, and zeros up to the next multiple of 16.
template <class T, class R>
inline void widen_block(const void* x, void* residual, float* v, std::int64_t numel) {
  for (std::int64_t i = numel; i < padded16(numel); ++i) v[i] = 0.0f;
  auto* from = static_cast<const T*>(x);
  if constexpr (__is_same(R, Absent)) {
    sweep(numel, [](const T* a, float* sum) { store(sum, load(a)); }, from, v);
  } else {
    sweep(
        numel, [](const T* a, R* r, float* sum) { store(sum, load(a) + load(r)); }, from,
        static_cast<R*>(residual), v);
  }
}

// residual = v - decoded
template <class R>
inline void keep_residual(void* residual, float* v, float* decoded, std::int64_t numel) {
  if constexpr (!__is_same(R, Absent)) {
    sweep(
        numel, [](float* a, float* b, R* r) { store(r, load(a) - load(b)); }, v, decoded,
        static_cast<R*>(residual));
  }
}

// out = values, or out += values
template <class T>
inline void write_block(void* out, float* values, std::int64_t numel, bool add) {
  auto* to = static_cast<T*>(out);
  if (add) {
    sweep(numel, [](float* a, T* o) { store(o, load(o) + load(a)); }, values, to);
  } else {
    sweep(numel, [](float* a, T* o) { store(o, load(a)); }, values, to);
  }
}

template <class T, class R>
float sign_encode_block(const void* x, void* residual, std::uint8_t* bits, std::int64_t numel) {
  float v[kMaxCodeBlock];
  widen_block<T, R>(x, residual, v, numel);
  Sum16 sum = zero16();
  for (std::int64_t i = 0; i < numel; i += 16) {
    add_magnitudes(sum, widen16(v + i));
    unsigned mask = 0;
    for (int lane = 0; lane < 16; lane += kLanes) mask |= sign_bits(load(v + i + lane)) << lane;
    bits[i / 8] = static_cast<std::uint8_t>(mask);
    if (numel - i > 8) bits[i / 8 + 1] = static_cast<std::uint8_t>(mask >> 8);
  }
  const auto scale = static_cast<float>(tree_sum(sum) / static_cast<double>(numel));
  if constexpr (!__is_same(R, Absent)) {
    const F32 plus = set(scale), minus = set(-scale);
    sweep(
        numel,
        [&](float* a, R* r) {
          const F32 value = load(a);
          store(r, value - select(sign_bits(value), minus, plus));
        },
        static_cast<float*>(v), static_cast<R*>(residual));
  }
  return scale;
}

template <class T>
void sign_decode_block(const std::uint8_t* bits, float scale, bool add, void* out, std::int64_t numel) {
  float v[kMaxCodeBlock];
  const F32 plus = set(scale), minus = set(-scale);
  for (std::int64_t i = 0; i < numel; i += 16) {
    const unsigned mask = bits[i / 8] | (numel - i > 8 ? static_cast<unsigned>(bits[i / 8 + 1]) << 8 : 0u);
    for (int lane = 0; lane < 16; lane += kLanes) store(v + i + lane, select(mask >> lane, minus, plus));
  }
  write_block<T>(out, v, numel, add);
}

inline std::uint32_t word_of(float x) { return __builtin_bit_cast(std::uint32_t, x); }
inline float float_of_word(std::uint32_t x) { return __builtin_bit_cast(float, x); }

// q = round(v * inverse), within [-levels, levels].
inline void round_block(const float* v, float inverse, std::int32_t levels, std::int64_t begin,
                        const Rounding& rounding, std::int32_t* q, std::int64_t numel) {
  if (rounding.stochastic) {
    const std::uint32_t key = random_key(rounding.seed, begin);
    const auto low = static_cast<std::uint32_t>(begin);
    for (std::int64_t i = 0; i < numel; ++i) {
      const float uniform = uniform_of(random_word(low + static_cast<std::uint32_t>(i), key));
      const float scaled = v[i] * inverse + (uniform - 0.5f);
      q[i] = rounded(word_of(scaled + kRound), levels);
    }
  } else {
    for (std::int64_t i = 0; i < numel; ++i) q[i] = rounded(word_of(v[i] * inverse + kRound), levels);
  }
}

template <int kBits>
inline void pack_codes(const std::int32_t* q, std::uint8_t* codes, std::int64_t numel) {
  if constexpr (kBits == 8) {
    for (std::int64_t i = 0; i < numel; ++i) codes[i] = static_cast<std::uint8_t>(q[i]);
  } else {
    for (std::int64_t i = 0; i < numel / 2; ++i) {
      codes[i] = static_cast<std::uint8_t>((q[2 * i] + 8) | (q[2 * i + 1] + 8) << 4);
    }
    if (numel % 2 != 0) codes[numel / 2] = static_cast<std::uint8_t>(q[numel - 1] + 8);
  }
}

template <int kBits>
inline void unpack_codes(const std::uint8_t* codes, std::int32_t* q, std::int64_t numel) {
  if constexpr (kBits == 8) {
    for (std::int64_t i = 0; i < numel; ++i) q[i] = static_cast<std::int8_t>(codes[i]);
  } else {
    for (std::int64_t i = 0; i < numel / 2; ++i) {
      q[2 * i] = static_cast<std::int32_t>(codes[i] & 15u) - 8;
      q[2 * i + 1] = static_cast<std::int32_t>(codes[i] >> 4) - 8;
    }
    if (numel % 2 != 0) q[numel - 1] = static_cast<std::int32_t>(codes[numel / 2] & 15u) - 8;
  }
}

template <int kBits, class T, class R>
float int_encode_block(const void* x, void* residual, std::uint8_t* codes, std::int64_t numel,
                       std::int64_t begin, const Rounding& rounding) {
  constexpr std::int32_t kLevels = (1 << (kBits - 1)) - 1;
  constexpr std::uint32_t kInfinity = 0x7F800000u, kSmallestNormal = 0x00800000u;
  float v[kMaxCodeBlock];
  std::int32_t q[kMaxCodeBlock];
  widen_block<T, R>(x, residual, v, numel);
  std::uint32_t largest = 0;  // magnitudes are ordered as their bits are
  for (std::int64_t i = 0; i < padded16(numel); ++i) {
    const std::uint32_t magnitude = word_of(v[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  float scale = float_of_word(largest) / static_cast<float>(kLevels);
  if (word_of(scale) < kSmallestNormal) scale = 0.0f;
  if (largest >= kInfinity) scale = __builtin_nanf("");
  if (scale > 0.0f) {
    round_block(v, 1.0f / scale, kLevels, begin, rounding, q, padded16(numel));
  } else if (scale == 0.0f) {
    float zeros[kMaxCodeBlock] = {};
    round_block(zeros, 0.0f, kLevels, begin, rounding, q, padded16(numel));
  } else {
    for (std::int64_t i = 0; i < numel; ++i) q[i] = 0;
  }
  pack_codes<kBits>(q, codes, numel);
  if constexpr (!__is_same(R, Absent)) {
    float decoded[kMaxCodeBlock];
    for (std::int64_t i = 0; i < numel; ++i) decoded[i] = static_cast<float>(q[i]) * scale;
    keep_residual<R>(residual, v, decoded, numel);
  }
  return scale;
}

template <int kBits, class T>
void int_decode_block(const std::uint8_t* codes, float scale, float weight, bool add, void* out,
                      std::int64_t numel) {
  std::int32_t q[kMaxCodeBlock];
  float v[kMaxCodeBlock];
  unpack_codes<kBits>(codes, q, numel);
  for (std::int64_t i = 0; i < numel; ++i) v[i] = static_cast<float>(q[i]) * scale * weight;
  write_block<T>(out, v, numel, add);
}
