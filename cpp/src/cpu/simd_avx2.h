// AVX2 + FMA + F16C vectors. Included inside the target's region and namespace by kernels_avx2.cc.
// The three simd_*.h headers offer the same names; see simd_baseline.h for what each one means.

constexpr int kLanes = 8;

struct F32 {
  __m256 raw;
};

inline F32 set(float x) { return {_mm256_set1_ps(x)}; }

inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.raw, b.raw)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.raw, b.raw)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.raw, b.raw)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.raw, b.raw)}; }
inline F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.raw)}; }
inline F32 fused(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.raw, b.raw, c.raw)}; }
inline F32 largest(F32 a, F32 b) { return {_mm256_max_ps(a.raw, b.raw)}; }

inline F32 sign(F32 a) {
  const __m256 zero = _mm256_setzero_ps();
  const __m256 positive = _mm256_and_ps(_mm256_cmp_ps(a.raw, zero, _CMP_GT_OQ), _mm256_set1_ps(1.0f));
  const __m256 negative = _mm256_and_ps(_mm256_cmp_ps(a.raw, zero, _CMP_LT_OQ), _mm256_set1_ps(-1.0f));
  return {_mm256_or_ps(positive, negative)};
}
inline unsigned sign_bits(F32 a) { return static_cast<unsigned>(_mm256_movemask_ps(a.raw)); }
inline F32 select(unsigned mask, F32 a, F32 b) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i bits = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), lane_bit);
  return {_mm256_blendv_ps(b.raw, a.raw, _mm256_castsi256_ps(_mm256_cmpeq_epi32(bits, lane_bit)))};
}

inline F32 load(const float* x) { return {_mm256_loadu_ps(x)}; }
inline F32 load(const BF16* x) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline F32 load(const F16* x) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
}

inline void store(float* out, F32 a) { _mm256_storeu_ps(out, a.raw); }
inline void store(BF16* out, F32 a) {
  const __m256i bits = _mm256_castps_si256(a.raw);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.raw, a.raw, _CMP_UNORD_Q));
  const __m256i half = _mm256_blendv_epi8(rounded, quiet, is_nan);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
}
inline void store(F16* out, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(a.raw, _MM_FROUND_TO_NEAREST_INT));
}

inline void transpose(F32 (&rows)[kLanes]) {
  __m256 t[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i].raw, rows[i + 1].raw);
    t[i + 1] = _mm256_unpackhi_ps(rows[i].raw, rows[i + 1].raw);
  }
  // u[4 i + j], half q: column 4 q + j of rows 4 i to 4 i + 3.
  __m256 u[kLanes];
  for (int i = 0; i < kLanes; i += 4) {
    const __m256d a = _mm256_castps_pd(t[i]), b = _mm256_castps_pd(t[i + 1]);
    const __m256d c = _mm256_castps_pd(t[i + 2]), d = _mm256_castps_pd(t[i + 3]);
    u[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    u[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    u[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    u[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
  for (int j = 0; j < 4; ++j) {
    rows[j] = {_mm256_permute2f128_ps(u[j], u[4 + j], 0x20)};
    rows[4 + j] = {_mm256_permute2f128_ps(u[j], u[4 + j], 0x31)};
  }
}

struct I32 {
  __m256i raw;
};

inline I32 set_bits(std::uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
inline I32 bits_of(F32 a) { return {_mm256_castps_si256(a.raw)}; }
inline F32 float_of(I32 a) { return {_mm256_castsi256_ps(a.raw)}; }
inline I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.raw, b.raw)}; }
inline I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.raw, b.raw)}; }
inline I32 operator*(I32 a, I32 b) { return {_mm256_mullo_epi32(a.raw, b.raw)}; }
inline I32 operator&(I32 a, I32 b) { return {_mm256_and_si256(a.raw, b.raw)}; }
inline I32 operator|(I32 a, I32 b) { return {_mm256_or_si256(a.raw, b.raw)}; }
inline I32 operator^(I32 a, I32 b) { return {_mm256_xor_si256(a.raw, b.raw)}; }
template <int kBits>
inline I32 left(I32 a) {
  return {_mm256_slli_epi32(a.raw, kBits)};
}
template <int kBits>
inline I32 right(I32 a) {
  return {_mm256_srli_epi32(a.raw, kBits)};
}
template <int kBits>
inline I32 right_signed(I32 a) {
  return {_mm256_srai_epi32(a.raw, kBits)};
}
inline I32 max_signed(I32 a, I32 b) { return {_mm256_max_epi32(a.raw, b.raw)}; }
inline I32 min_signed(I32 a, I32 b) { return {_mm256_min_epi32(a.raw, b.raw)}; }
inline I32 where_nonzero(I32 test, I32 a) {
  return {_mm256_andnot_si256(_mm256_cmpeq_epi32(test.raw, _mm256_setzero_si256()), a.raw)};
}
inline I32 load_words(const std::uint32_t* x) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))};
}
inline I32 load_shorts(const std::int16_t* x) {
  return {_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
}
inline void store_shorts(std::int16_t* out, I32 a) {
  const __m256i low = _mm256_and_si256(a.raw, _mm256_set1_epi32(0xffff));
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
}
inline I32 load_bytes(const std::uint8_t* x) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)))};
}
inline void store_bytes(std::uint8_t* out, I32 a) {
  const __m128i shorts = _mm_packus_epi32(_mm256_castsi256_si128(a.raw), _mm256_extracti128_si256(a.raw, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(shorts, shorts));
}
inline I32 merge(std::uint32_t mask, I32 a, I32 b) {
  const __m256i bits = _mm256_set1_epi32(static_cast<int>(mask));
  return {_mm256_or_si256(_mm256_and_si256(bits, a.raw), _mm256_andnot_si256(bits, b.raw))};
}
inline I32 max_unsigned(I32 a, I32 b) { return {_mm256_max_epu32(a.raw, b.raw)}; }
inline std::uint32_t largest_unsigned(I32 a) {
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(a.raw), _mm256_extracti128_si256(a.raw, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(half));
}

struct Sum16 {
  __m256d quarter[4];
};
inline Sum16 zero16() {
  return {{_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()}};
}

template <class T>
inline Sum16 widen16(const T* x) {
  const __m256 a = load(x).raw;
  const __m256 b = load(x + 8).raw;
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(b)), _mm256_cvtps_pd(_mm256_extractf128_ps(b, 1))}};
}
inline void add_squares(Sum16& sum, Sum16 x) {
  for (int i = 0; i < 4; ++i) {
    sum.quarter[i] = _mm256_add_pd(sum.quarter[i], _mm256_mul_pd(x.quarter[i], x.quarter[i]));
  }
}
inline void add_magnitudes(Sum16& sum, Sum16 x) {
  for (int i = 0; i < 4; ++i) {
    sum.quarter[i] = _mm256_add_pd(sum.quarter[i], _mm256_andnot_pd(_mm256_set1_pd(-0.0), x.quarter[i]));
  }
}
inline void store16(double* out, Sum16 sum) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(out + 4 * i, sum.quarter[i]);
}

struct WeightedWords {
  __m256i sum[2];
  __m256i weights[2];  // of the next 16 words
};
inline WeightedWords zero_words(std::uint32_t weight) {
  const __m256i index = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(kChecksumFactor));
  const __m256i low =
      _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(weight)), _mm256_mullo_epi32(index, factor));
  const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(static_cast<int>(16 * kChecksumFactor)));
  return {{_mm256_setzero_si256(), _mm256_setzero_si256()}, {low, high}};
}
inline void add_words(WeightedWords& s, const unsigned char* x) {
  for (int i = 0; i < 2; ++i) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x) + i);
    const __m256i even = _mm256_mul_epu32(words, s.weights[i]);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(words, 32), _mm256_srli_epi64(s.weights[i], 32));
    s.sum[i] = _mm256_add_epi64(s.sum[i], _mm256_add_epi64(even, odd));
    s.weights[i] = _mm256_add_epi32(s.weights[i], _mm256_set1_epi32(static_cast<int>(32 * kChecksumFactor)));
  }
}
inline std::uint64_t total(const WeightedWords& s) {
  std::uint64_t lane[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lane), _mm256_add_epi64(s.sum[0], s.sum[1]));
  return lane[0] + lane[1] + lane[2] + lane[3];
}
