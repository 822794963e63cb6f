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
