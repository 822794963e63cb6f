// Portable vectors of 4 floats: SSE2 on x86-64, NEON on Arm. Included inside the target's namespace by
// kernels_baseline.cc.
//
// What every simd_*.h offers:
//   kLanes, F32            a vector of kLanes floats; set, + - * /, sqrt: one IEEE operation per lane, never
//   fused load(const T*)         kLanes elements of float, BF16 or F16, unaligned, widened store(T*, F32)
//   rounds to nearest even; a NaN stays a NaN with its sign and upper payload bits Sum16                  16
//   fp64 accumulators whatever the vector width, so that sums have the same bits zero16, widen16,
//   add_squares, add_magnitudes, store16 sign(F32)              -1, 0 or 1 per lane; 0 for NaN sign_bits(F32)
//   bit i = sign bit of lane i select(mask, a, b)     lane i of a where bit i is set, else of b
//   I32: bits_of(F32), float_of(I32), wrapping + - *, & | ^, left<n>, right<n>, right_signed<n>, max_signed,
//   min_signed, max_unsigned, where_nonzero(test, a): a or 0, merge(mask, a, b): the bits of a in mask, else
//   those of b; loads and stores that widen and narrow; store_bytes: lanes from 0 to 32767, above 255 as 255;
//   largest_unsigned: of all lanes
//   transpose(F32 (&rows)[kLanes]): lane j of vector i becomes lane i of vector j
//   WeightedWords: zero_words, add_words, total: [Note: checksum of a block], 16 words at a time
// No default member initializers: GCC compiles implicit constructors outside the target's region.

#include "formulas/half-inl.h"

constexpr int kLanes = 4;

typedef float Float4 __attribute__((vector_size(16)));

struct F32 {
  Float4 raw;
};

inline F32 set(float x) { return {Float4{x, x, x, x}}; }

inline F32 operator+(F32 a, F32 b) { return {a.raw + b.raw}; }
inline F32 operator-(F32 a, F32 b) { return {a.raw - b.raw}; }
inline F32 operator*(F32 a, F32 b) { return {a.raw * b.raw}; }
inline F32 operator/(F32 a, F32 b) { return {a.raw / b.raw}; }
inline F32 sqrt(F32 a) {
  F32 root;
  for (int i = 0; i < kLanes; ++i) root.raw[i] = __builtin_sqrtf(a.raw[i]);
  return root;
}

// a * b + c, rounded once where the target can, so bits depend on the target: not for results that must not.
inline F32 fused(F32 a, F32 b, F32 c) { return {a.raw * b.raw + c.raw}; }
inline F32 largest(F32 a, F32 b) {
  F32 most;
  for (int i = 0; i < kLanes; ++i) most.raw[i] = a.raw[i] > b.raw[i] ? a.raw[i] : b.raw[i];
  return most;
}

inline F32 sign(F32 a) {
  F32 s;
  for (int i = 0; i < kLanes; ++i) s.raw[i] = static_cast<float>((a.raw[i] > 0.0f) - (a.raw[i] < 0.0f));
  return s;
}
inline unsigned sign_bits(F32 a) {
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (bits_of(a.raw[i]) >> 31) << i;
  return mask;
}
inline F32 select(unsigned mask, F32 a, F32 b) {
  F32 s;
  for (int i = 0; i < kLanes; ++i) s.raw[i] = (mask >> i & 1u) != 0 ? a.raw[i] : b.raw[i];
  return s;
}

template <class T>
inline F32 load(const T* x) {
  F32 a;
  for (int i = 0; i < kLanes; ++i) a.raw[i] = widen(x[i]);
  return a;
}
template <class T>
inline void store(T* out, F32 a) {
  for (int i = 0; i < kLanes; ++i) narrow(out + i, a.raw[i]);
}

inline void transpose(F32 (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = rows[i].raw[j];
      rows[i].raw[j] = rows[j].raw[i];
      rows[j].raw[i] = x;
    }
  }
}

typedef std::int32_t Int4 __attribute__((vector_size(16)));
typedef std::uint32_t UInt4 __attribute__((vector_size(16)));

struct I32 {
  UInt4 raw;
};

inline I32 set_bits(std::uint32_t x) { return {UInt4{x, x, x, x}}; }
inline I32 bits_of(F32 a) { return {__builtin_bit_cast(UInt4, a.raw)}; }
inline F32 float_of(I32 a) { return {__builtin_bit_cast(Float4, a.raw)}; }
inline I32 operator+(I32 a, I32 b) { return {a.raw + b.raw}; }
inline I32 operator-(I32 a, I32 b) { return {a.raw - b.raw}; }
inline I32 operator*(I32 a, I32 b) { return {a.raw * b.raw}; }
inline I32 operator&(I32 a, I32 b) { return {a.raw & b.raw}; }
inline I32 operator|(I32 a, I32 b) { return {a.raw | b.raw}; }
inline I32 operator^(I32 a, I32 b) { return {a.raw ^ b.raw}; }
template <int kBits>
inline I32 left(I32 a) {
  return {a.raw << kBits};
}
template <int kBits>
inline I32 right(I32 a) {
  return {a.raw >> kBits};
}
template <int kBits>
inline I32 right_signed(I32 a) {
  return {__builtin_bit_cast(UInt4, __builtin_bit_cast(Int4, a.raw) >> kBits)};
}
inline I32 max_signed(I32 a, I32 b) {
  const auto greater =
      __builtin_bit_cast(UInt4, __builtin_bit_cast(Int4, a.raw) > __builtin_bit_cast(Int4, b.raw));
  return {(a.raw & greater) | (b.raw & ~greater)};
}
inline I32 min_signed(I32 a, I32 b) {
  const auto less =
      __builtin_bit_cast(UInt4, __builtin_bit_cast(Int4, a.raw) < __builtin_bit_cast(Int4, b.raw));
  return {(a.raw & less) | (b.raw & ~less)};
}
inline I32 where_nonzero(I32 test, I32 a) {
  return {a.raw & __builtin_bit_cast(UInt4, test.raw != UInt4{0, 0, 0, 0})};
}
inline I32 load_words(const std::uint32_t* x) {
  I32 a;
  __builtin_memcpy(&a.raw, x, sizeof a.raw);
  return a;
}
inline I32 load_shorts(const std::int16_t* x) {
  I32 a;
  for (int i = 0; i < kLanes; ++i) a.raw[i] = static_cast<std::uint32_t>(static_cast<std::int32_t>(x[i]));
  return a;
}
inline void store_shorts(std::int16_t* out, I32 a) {
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<std::int16_t>(a.raw[i]);
}
inline I32 load_bytes(const std::uint8_t* x) {
  I32 a;
  for (int i = 0; i < kLanes; ++i) a.raw[i] = x[i];
  return a;
}
inline void store_bytes(std::uint8_t* out, I32 a) {
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<std::uint8_t>(a.raw[i] < 255 ? a.raw[i] : 255);
}
inline I32 merge(std::uint32_t mask, I32 a, I32 b) { return {(a.raw & mask) | (b.raw & ~mask)}; }
inline I32 max_unsigned(I32 a, I32 b) {
  const auto greater = __builtin_bit_cast(UInt4, a.raw > b.raw);
  return {(a.raw & greater) | (b.raw & ~greater)};
}
inline std::uint32_t largest_unsigned(I32 a) {
  std::uint32_t largest = a.raw[0];
  for (int i = 1; i < kLanes; ++i) largest = a.raw[i] > largest ? a.raw[i] : largest;
  return largest;
}

struct Sum16 {
  double lane[16];
};
inline Sum16 zero16() { return {}; }

template <class T>
inline Sum16 widen16(const T* x) {
  Sum16 wide;
  for (int i = 0; i < 16; ++i) wide.lane[i] = widen(x[i]);
  return wide;
}
inline void add_squares(Sum16& sum, const Sum16& x) {
  for (int i = 0; i < 16; ++i) sum.lane[i] += x.lane[i] * x.lane[i];
}
inline void add_magnitudes(Sum16& sum, const Sum16& x) {
  for (int i = 0; i < 16; ++i) sum.lane[i] += __builtin_fabs(x.lane[i]);
}
inline void store16(double* out, const Sum16& sum) {
  for (int i = 0; i < 16; ++i) out[i] = sum.lane[i];
}

// 16 words of 32 bits times their weights, added modulo 2^64.
struct WeightedWords {
  std::uint64_t sum;
  std::uint32_t weight;  // of the next word
};
inline WeightedWords zero_words(std::uint32_t weight) { return {0, weight}; }
inline void add_words(WeightedWords& s, const unsigned char* x) {
  std::uint32_t words[16];
  __builtin_memcpy(words, x, sizeof words);
  for (std::uint32_t i = 0; i < 16; ++i) {
    s.sum += static_cast<std::uint64_t>(words[i]) * (s.weight + 2 * i * kChecksumFactor);
  }
  s.weight += 32 * kChecksumFactor;
}
inline std::uint64_t total(const WeightedWords& s) { return s.sum; }
