// Adam with [Note: 8-bit moments] (ds/formats.h). Included per target.

constexpr int kBlockVectors = kMomentBlock / kLanes;
constexpr std::uint32_t kSize = 0x7fffffffu;  // of an fp32 number: all but its sign
// Per element of a block: the bits of m's byte that are its code, and the random bits below it.
#define DS_EIGHT(x) x, x, x, x, x, x, x, x
constexpr std::uint32_t kCodeMask[32] = {DS_EIGHT(0x7e), DS_EIGHT(0x7f), DS_EIGHT(0x7f), DS_EIGHT(0x7f)};
constexpr std::uint32_t kBelow[32] = {DS_EIGHT(0x1fffff), DS_EIGHT(0xfffff), DS_EIGHT(0xfffff),
                                      DS_EIGHT(0xfffff)};
#undef DS_EIGHT

// Both moments of a block, or of the elements of a short one.
struct Moments {
  F32 m[kBlockVectors];
  F32 v[kBlockVectors];
};

// The bits below the smallest codes.
DS_INLINE std::uint32_t lowest_m(std::uint32_t exponent) { return ((exponent + 129) / 2 - 13) << 23; }
DS_INLINE std::uint32_t lowest_v(std::uint32_t exponent) { return (exponent - 31) << 23; }

DS_INLINE void unpack_block(const std::uint8_t* m8, const std::uint8_t* v8, Moments& out) {
  std::uint64_t first;
  __builtin_memcpy(&first, m8, 8);
  const auto exponent = static_cast<std::uint32_t>((first & 0x0101010101010101u) * 0x0102040810204080u >> 56);
  if (__builtin_expect(exponent == 0 || exponent == 255, 0)) {
    const F32 all = set(exponent == 0 ? 0.0f : __builtin_nanf(""));
    for (int i = 0; i < kBlockVectors; ++i) out.m[i] = out.v[i] = all;
    return;
  }
  const I32 low_m = set_bits(lowest_m(exponent));
  const I32 low_v = set_bits(lowest_v(exponent));
  for (int i = 0; i < kBlockVectors; ++i) {
    const I32 byte = load_bytes(m8 + i * kLanes);
    const I32 code = byte & load_words(kCodeMask + i * kLanes);
    out.m[i] = float_of(merge(0x80000000u, left<24>(byte), where_nonzero(code, left<20>(code) + low_m)));
    out.v[i] = float_of(left<20>(load_bytes(v8 + i * kLanes)) + low_v);
  }
}

DS_INLINE void pack_block(const Moments& in, std::uint8_t* m8, std::uint8_t* v8, std::uint32_t key) {
  I32 top = bits_of(in.v[0]);  // a NaN may have a sign: unsigned, it is the largest number, too
  for (int i = 1; i < kBlockVectors; ++i) top = max_unsigned(top, bits_of(in.v[i]));
  const std::uint32_t largest = largest_unsigned(top);
  // That of the next code: V must be able to reach it, or a growing V would never leave its octave.
  auto exponent = static_cast<std::uint32_t>((std::uint64_t{largest} + 0xfffffu) >> 23);
  if (__builtin_expect(largest == 0 || exponent >= 255, 0)) {
    __builtin_memset(m8, largest == 0 ? 0 : 0xff, kMomentBlock);
    __builtin_memset(v8, largest == 0 ? 0 : 0xff, kMomentBlock);
    return;
  }
  exponent = exponent < 32 ? 32 : exponent;
  const I32 low_m = set_bits(lowest_m(exponent));
  const I32 low_v = set_bits(lowest_v(exponent));
  for (int i = 0; i < kBlockVectors; ++i) {
    const I32 m = bits_of(in.m[i]);
    const I32 v = bits_of(in.v[i]);
    const I32 random = ((m ^ set_bits(key)) + v) * set_bits(0x9e3779b1u);
    const I32 below = right<11>(random) & load_words(kBelow + i * kLanes);
    I32 code = max_signed((m & set_bits(kSize)) - low_m + below, set_bits(0));
    code = min_signed(right<20>(code), set_bits(127)) & load_words(kCodeMask + i * kLanes);
    store_bytes(m8 + i * kLanes, merge(0x80u, right<24>(m), code));
    store_bytes(v8 + i * kLanes, right<20>(max_signed(v - low_v + right<12>(random), set_bits(0))));
  }
  std::uint64_t first;
  __builtin_memcpy(&first, m8, 8);
  const std::uint64_t spread = exponent * 0x0101010101010101u & 0x8040201008040201u;
  first |= (spread + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
  __builtin_memcpy(m8, &first, 8);
}

// An element that is in no block: each byte has an exponent of its own.
constexpr std::uint32_t kAloneM = (127u - 56u) << 23;
constexpr std::uint32_t kAloneV = (127u - 112u) << 23;

inline void unpack_alone(std::uint8_t m8, std::uint8_t v8, float* m, float* v) {
  const std::uint32_t code = m8 & 0x7fu;
  const std::uint32_t sign = static_cast<std::uint32_t>(m8 & 0x80u) << 24;
  const std::uint32_t code_v = v8;
  *m = __builtin_bit_cast(float, (code != 0 ? (code << 22) + kAloneM : 0) | sign);
  *v = __builtin_bit_cast(float, code_v != 0 ? (code_v << 22) + kAloneV : 0);
  if (code_v == 255) *m = *v = __builtin_nanf("");
}

inline std::uint32_t code_alone(std::uint32_t bits, std::uint32_t low, std::uint32_t below,
                                std::int32_t least, std::int32_t most) {
  const std::int32_t code = static_cast<std::int32_t>(bits - low + below) >> 22;
  return static_cast<std::uint32_t>(code < least ? least : code > most ? most : code);
}

inline void pack_alone(float m, float v, std::uint8_t* m8, std::uint8_t* v8, std::uint32_t key) {
  const auto bits_m = __builtin_bit_cast(std::uint32_t, m);
  const auto bits_v = __builtin_bit_cast(std::uint32_t, v);
  if ((bits_m & kSize) >= 0x7f800000u || bits_v >= 0x7f800000u) {
    *m8 = *v8 = 0xff;
    return;
  }
  const std::uint32_t random = ((bits_m ^ key) + bits_v) * 0x9e3779b1u;
  const std::uint32_t code = code_alone(bits_m & kSize, kAloneM, random >> 10, 0, 127);
  *m8 = static_cast<std::uint8_t>(code | (bits_m >> 24 & 0x80u));
  *v8 = static_cast<std::uint8_t>(bits_v == 0 ? 0 : code_alone(bits_v, kAloneV, random >> 10, 1, 254));
}

template <class Grad, class Out>
DS_INLINE void adam8_vectors(const AdamFactors& k, float* param, Moments& moments, const Grad* grad,
                             Out* out) {
  for (int i = 0; i < kBlockVectors; ++i) {
    const std::int64_t at = i * kLanes;
    const F32 p = adam_update(k, load(param + at), moments.m[i], moments.v[i], load(advance(grad, at)));
    store(param + at, p);
    store(advance(out, at), p);
  }
}

template <class T>
inline void copy_elements(const T* from, T* to, std::int64_t numel) {
  for (std::int64_t i = 0; i < numel; ++i) to[i] = from[i];
}
inline void copy_elements(const Absent*, Absent*, std::int64_t) {}
template <class T>
struct BlockOf {
  T data[kMomentBlock];
};
template <>
struct BlockOf<Absent> {
  Absent* data;
};

// The last elements of a tensor, fewer than kMomentBlock: as [Note: tails].
template <class Grad, class Out>
void adam8_rest(const AdamFactors& k, float* param, std::uint8_t* m8, std::uint8_t* v8, const Grad* grad,
                Out* out, std::uint32_t key, std::int64_t numel) {
  float p[kMomentBlock] = {};
  Grad g[kMomentBlock] = {};
  std::uint8_t bytes[2][kMomentBlock] = {};
  BlockOf<Out> copies{};
  copy_elements(param, p, numel);
  copy_elements(grad, g, numel);
  copy_elements(m8, bytes[0], numel);
  copy_elements(v8, bytes[1], numel);
  Moments moments;
  float m[kMomentBlock] = {};
  float v[kMomentBlock] = {};
  const bool alone = numel < 8;
  if (alone) {
    for (std::int64_t i = 0; i < numel; ++i) unpack_alone(m8[i], v8[i], m + i, v + i);
    for (int i = 0; i < kBlockVectors; ++i) {
      moments.m[i] = load(m + i * kLanes);
      moments.v[i] = load(v + i * kLanes);
    }
  } else {
    unpack_block(bytes[0], bytes[1], moments);
  }
  adam8_vectors(k, p, moments, static_cast<const Grad*>(g), static_cast<Out*>(copies.data));
  for (int i = 0; i < kBlockVectors; ++i) {
    store(m + i * kLanes, moments.m[i]);
    store(v + i * kLanes, moments.v[i]);
  }
  if (alone) {
    for (std::int64_t i = 0; i < numel; ++i) pack_alone(m[i], v[i], m8 + i, v8 + i, key);
  } else {
    for (std::int64_t i = numel; i < kMomentBlock; ++i)
      m[i] = v[i] = 0.0f;  // may have decayed from a code of v
    for (int i = 0; i < kBlockVectors; ++i) {
      moments.m[i] = load(m + i * kLanes);
      moments.v[i] = load(v + i * kLanes);
    }
    pack_block(moments, bytes[0], bytes[1], key);
    copy_elements(bytes[0], m8, numel);
    copy_elements(bytes[1], v8, numel);
  }
  copy_elements(p, param, numel);
  copy_elements(static_cast<const Out*>(copies.data), out, numel);
}

template <class Grad, class Out>
void adam8_range(const AdamScalars& scalars, float* param, std::uint8_t* m8, std::uint8_t* v8,
                 const void* grad, void* out, std::uint32_t key, std::int64_t numel) {
  const AdamFactors k = adam_factors(scalars);
  const auto* gs = static_cast<const Grad*>(grad);
  auto* os = static_cast<Out*>(out);
  std::int64_t i = 0;
  for (; i + kMomentBlock <= numel; i += kMomentBlock) {
    // [Note: prefetch]
    prefetch(param + i + kAhead);
    prefetch(param + i + kAhead + kLine);
    prefetch(gs + i + kAhead);
    if (sizeof(Grad) == 4) prefetch(gs + i + kAhead + kLine);
    prefetch(advance(os, i + kAhead));
    if (i % (2 * kMomentBlock) == 0) {
      prefetch(m8 + i + kAhead);
      prefetch(v8 + i + kAhead);
    }
    Moments moments;
    unpack_block(m8 + i, v8 + i, moments);
    adam8_vectors(k, param + i, moments, gs + i, advance(os, i));
    pack_block(moments, m8 + i, v8 + i, key);
  }
  if (i < numel) adam8_rest(k, param + i, m8 + i, v8 + i, gs + i, advance(os, i), key, numel - i);
}
