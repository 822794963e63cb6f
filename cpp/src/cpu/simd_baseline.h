// Portable vectors of 4 floats: SSE2 on x86-64, NEON on Arm. Included inside the target's namespace by
// kernels_baseline.cc.
//
// What every simd_*.h offers:
//   kLanes, F32            a vector of kLanes floats; set, + - * /, sqrt: one IEEE operation per lane, never fused
//   load(const T*)         kLanes elements of float, BF16 or F16, unaligned, widened
//   store(T*, F32)         rounds to nearest even; a NaN stays a NaN with its sign and upper payload bits
//   Sum16                  16 fp64 accumulators whatever the vector width, so that sums have the same bits
//   zero16, widen16, add_squares, add_magnitudes, store16
//   sign(F32)              -1, 0 or 1 per lane; 0 for NaN
//   sign_bits(F32)         bit i = sign bit of lane i
//   select(mask, a, b)     lane i of a where bit i is set, else of b
// No default member initializers: GCC compiles implicit constructors outside the target's region.

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

inline std::uint32_t bits_of(float x) { return __builtin_bit_cast(std::uint32_t, x); }
inline float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

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

inline float widen(float x) { return x; }
inline float widen(BF16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }
inline float widen(F16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // inf; a NaN becomes quiet
    const std::uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0;
    return float_of(sign | 0x7f800000u | quiet | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude < 0x400u) {  // zero or subnormal: exact in fp32
    return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  }
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

inline void narrow(float* out, float x) { *out = x; }
inline void narrow(BF16* out, float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (bits >> 16) | 0x40u;
  out->bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
inline void narrow(F16* out, float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to inf
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 places the last kept bit at the last bit of the sum, which the hardware rounds.
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(sign | half);
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
