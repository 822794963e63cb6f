// Blocks of values to codes of 1, 4 or 8 bits and back. Included per target.
//
// The values of a block are first widened to an array that stays in the L1 cache, because its scale must be
// known before the first code. Loops over 32-bit integers are left to the compiler, which vectorises them for
// each target: no sum of floats is among them whose order could change.

// [Note: prefetch of the next block] While a block is computed, the memory would be idle: all of it was read
// at once, into the L1 cache. So its steps ask for the next block's lines, which usually lie behind it.
constexpr std::int64_t kCodesAtOnce = 256;
template <class T>
inline void prefetch_behind(const T* x, std::int64_t numel, std::int64_t i, std::int64_t count) {
  constexpr std::int64_t kStep = 64 / static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t k = i; k < i + count; k += kStep) __builtin_prefetch(x + numel + k);
}
inline void prefetch_behind(const Absent*, std::int64_t, std::int64_t, std::int64_t) {}

constexpr std::int64_t padded16(std::int64_t numel) { return (numel + 15) / 16 * 16; }

// v = x + residual, and zeros up to the next multiple of 16. Returns the bits of the largest magnitude:
// magnitudes are ordered as their bits are.
template <class T, class R>
inline std::uint32_t widen_block(const void* x, void* residual, float* v, std::int64_t numel) {
  for (std::int64_t i = numel; i < padded16(numel); ++i) v[i] = 0.0f;
  auto* from = static_cast<const T*>(x);
  const I32 magnitude = set_bits(0x7FFFFFFFu);
  I32 largest = set_bits(0u);
  const auto keep = [&](float* to, F32 value) {
    store(to, value);
    largest = max_unsigned(largest, bits_of(value) & magnitude);
  };
  if constexpr (__is_same(R, Absent)) {
    sweep(numel, [&](const T* a, float* sum) { keep(sum, load(a)); }, from, v);
  } else {
    sweep(
        numel, [&](const T* a, R* r, float* sum) { keep(sum, load(a) + load(r)); }, from,
        static_cast<R*>(residual), v);
  }
  return largest_unsigned(largest);
}

// residual = v - scale * code
template <class R>
inline void keep_residual(void* residual, float* v, const std::int8_t* q, float scale, std::int64_t numel) {
  if constexpr (__is_same(R, float)) {
    auto* to = static_cast<float*>(residual);
    for (std::int64_t i = 0; i < numel; ++i) to[i] = v[i] - static_cast<float>(q[i]) * scale;
  } else if constexpr (!__is_same(R, Absent)) {
    for (std::int64_t i = 0; i < numel; ++i) v[i] = v[i] - static_cast<float>(q[i]) * scale;
    sweep(numel, [](float* a, R* r) { store(r, load(a)); }, v, static_cast<R*>(residual));
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
  (void)widen_block<T, R>(x, residual, v, numel);
  Sum16 sum = zero16();
  for (std::int64_t i = 0; i < numel; i += 16) {
    prefetch_behind(static_cast<const T*>(x), numel, i, 16);
    prefetch_behind(static_cast<const R*>(residual), numel, i, 16);
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
  const F32 plus = set(scale), minus = set(-scale);
  std::int64_t done = 0;
  if constexpr (__is_same(T, float)) {  // straight to memory, which can so be busy all the time
    auto* to = static_cast<float*>(out);
    for (; done + 16 <= numel; done += 16) {
      const unsigned mask = bits[done / 8] | static_cast<unsigned>(bits[done / 8 + 1]) << 8;
      for (std::int64_t lane = 0; lane < 16; lane += kLanes) {
        const F32 value = select(mask >> lane, minus, plus);
        store(to + done + lane, add ? load(to + done + lane) + value : value);
      }
    }
  }
  float v[kMaxCodeBlock];
  for (std::int64_t i = done; i < numel; i += 16) {
    const unsigned mask = bits[i / 8] | (numel - i > 8 ? static_cast<unsigned>(bits[i / 8 + 1]) << 8 : 0u);
    for (int lane = 0; lane < 16; lane += kLanes)
      store(v + i - done + lane, select(mask >> lane, minus, plus));
  }
  write_block<T>(static_cast<T*>(out) + done, v, numel - done, add);
}

inline std::uint32_t word_of(float x) { return __builtin_bit_cast(std::uint32_t, x); }
inline float float_of_word(std::uint32_t x) { return __builtin_bit_cast(float, x); }

// q = round(v * inverse), within [-levels, levels].
// Randomly rounded ones use the random numbers of `key` from index `low` on.
inline void round_values(const float* v, float inverse, std::int32_t levels, bool stochastic,
                         std::uint32_t key, std::uint32_t low, std::int8_t* q, std::int64_t numel) {
  if (stochastic) {
    for (std::int64_t i = 0; i < numel; ++i) {
      const float uniform = uniform_of(random_word(low + static_cast<std::uint32_t>(i), key));
      const float scaled = v[i] * inverse + (uniform - 0.5f);
      q[i] = static_cast<std::int8_t>(rounded(word_of(scaled + kRound), levels));
    }
  } else {
    // No value is larger than levels / inverse, so none is rounded beyond.
    for (std::int64_t i = 0; i < numel; ++i) {
      q[i] = static_cast<std::int8_t>(word_of(v[i] * inverse + kRound) - kRoundBits);
    }
  }
}

// Two codes a byte: as pairs of bytes, which compilers narrow in vectors. Of a code from -7 to 7, the lower
// four bits with the highest of them inverted are those of the code with 8 added.
typedef std::uint16_t __attribute__((may_alias, aligned(1))) Pair;
inline void pack_codes(const std::int8_t* q, std::uint8_t* codes, std::int64_t numel) {
  const auto* pairs = reinterpret_cast<const Pair*>(q);
  for (std::int64_t i = 0; i < numel / 2; ++i) {
    const std::uint32_t raised = (pairs[i] & 0x0F0Fu) ^ 0x0808u;
    codes[i] = static_cast<std::uint8_t>(raised | raised >> 4);
  }
  if (numel % 2 != 0) codes[numel / 2] = static_cast<std::uint8_t>(q[numel - 1] + 8);
}
// Codes with 8 added.
inline void unpack_codes(const std::uint8_t* codes, std::uint8_t* raised, std::int64_t numel) {
  auto* pairs = reinterpret_cast<Pair*>(raised);
  for (std::int64_t i = 0; i < numel / 2; ++i) {
    pairs[i] = static_cast<std::uint16_t>((codes[i] & 15u) | (codes[i] & 0xF0u) << 4);
  }
  if (numel % 2 != 0) raised[numel - 1] = codes[numel / 2] & 15u;
}

template <int kBits, class T, class R>
float int_encode_block(const void* x, void* residual, std::uint8_t* codes, std::int64_t numel,
                       std::int64_t begin, const Rounding& rounding) {
  constexpr std::int32_t kLevels = (1 << (kBits - 1)) - 1;
  constexpr std::uint32_t kInfinity = 0x7F800000u, kSmallestNormal = 0x00800000u;
  float v[kMaxCodeBlock];
  std::int8_t small[kMaxCodeBlock];
  std::int8_t* const q = kBits == 8 ? reinterpret_cast<std::int8_t*>(codes) : small;
  const std::uint32_t largest = widen_block<T, R>(x, residual, v, numel);
  float scale = float_of_word(largest) / static_cast<float>(kLevels);
  if (word_of(scale) < kSmallestNormal) scale = 0.0f;
  if (largest >= kInfinity) scale = __builtin_nanf("");
  const std::uint32_t key = random_key(rounding.seed, begin);
  for (std::int64_t i = 0; i < numel; i += kCodesAtOnce) {
    const std::int64_t count = numel - i < kCodesAtOnce ? numel - i : kCodesAtOnce;
    prefetch_behind(static_cast<const T*>(x), numel, i, count);
    prefetch_behind(static_cast<const R*>(residual), numel, i, count);
    if (scale > 0.0f) {
      round_values(v + i, 1.0f / scale, kLevels, rounding.stochastic, key,
                   static_cast<std::uint32_t>(begin + i), q + i, count);
    } else {
      __builtin_memset(q + i, 0, static_cast<std::size_t>(count));
    }
  }
  if constexpr (kBits == 4) pack_codes(q, codes, numel);
  keep_residual<R>(residual, v, q, scale, numel);
  return scale;
}

// out = code * scale * weight, or added to it; codes are bytes from which `raised` is subtracted.
template <class T, class Code>
inline void write_codes(const Code* q, float raised, float scale, float weight, bool add, void* out,
                        std::int64_t numel) {
  const auto value = [&](std::int64_t i) { return (static_cast<float>(q[i]) - raised) * scale * weight; };
  if constexpr (__is_same(T, float)) {
    auto* to = static_cast<float*>(out);
    if (add) {
      for (std::int64_t i = 0; i < numel; ++i) to[i] = to[i] + value(i);
    } else {
      for (std::int64_t i = 0; i < numel; ++i) to[i] = value(i);
    }
  } else {
    float v[kMaxCodeBlock];
    for (std::int64_t i = 0; i < numel; ++i) v[i] = value(i);
    write_block<T>(out, v, numel, add);
  }
}

template <int kBits, class T>
void int_decode_block(const std::uint8_t* codes, float scale, float weight, bool add, void* out,
                      std::int64_t numel) {
  if constexpr (kBits == 8) {
    write_codes<T>(reinterpret_cast<const std::int8_t*>(codes), 0.0f, scale, weight, add, out, numel);
  } else {
    std::uint8_t raised[kMaxCodeBlock];
    unpack_codes(codes, raised, numel);
    write_codes<T>(raised, 8.0f, scale, weight, add, out, numel);
  }
}
