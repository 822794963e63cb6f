// AVX-512 (F, BW, VL, DQ) vectors. Included inside the target's region and namespace by kernels_avx512.cc.
// The three simd_*.h headers offer the same names; see simd_baseline.h for what each one means.

constexpr int kLanes = 16;

struct F32 {
  __m512 raw;
};

inline F32 set(float x) { return {_mm512_set1_ps(x)}; }

inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.raw, b.raw)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.raw, b.raw)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.raw, b.raw)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.raw, b.raw)}; }
inline F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.raw)}; }
inline F32 fused(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.raw, b.raw, c.raw)}; }
inline F32 largest(F32 a, F32 b) { return {_mm512_max_ps(a.raw, b.raw)}; }

inline F32 sign(F32 a) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 positive = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.raw, zero, _CMP_GT_OQ), one);
  return {_mm512_mask_sub_ps(positive, _mm512_cmp_ps_mask(a.raw, zero, _CMP_LT_OQ), zero, one)};
}
inline unsigned sign_bits(F32 a) { return _mm512_movepi32_mask(_mm512_castps_si512(a.raw)); }
inline F32 select(unsigned mask, F32 a, F32 b) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(mask), b.raw, a.raw)};
}

inline F32 load(const float* x) { return {_mm512_loadu_ps(x)}; }
inline F32 load(const BF16* x) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline F32 load(const F16* x) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
}

inline void store(float* out, F32 a) { _mm512_storeu_ps(out, a.raw); }
inline void store(BF16* out, F32 a) {
  const __m512i bits = _mm512_castps_si512(a.raw);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.raw, a.raw, _CMP_UNORD_Q);
  const __m512i half = _mm512_mask_mov_epi32(rounded, is_nan, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(half));
}
inline void store(F16* out, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(a.raw, _MM_FROUND_TO_NEAREST_INT));
}

inline void transpose(F32 (&rows)[kLanes]) {
  __m512 t[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i].raw, rows[i + 1].raw);
    t[i + 1] = _mm512_unpackhi_ps(rows[i].raw, rows[i + 1].raw);
  }
  // u[4 i + j], quarter q: column 4 q + j of rows 4 i to 4 i + 3.
  __m512 u[kLanes];
  for (int i = 0; i < kLanes; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 even = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);
    const __m512 even_2 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const __m512 odd_2 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    rows[j] = {_mm512_shuffle_f32x4(even, even_2, 0x88)};
    rows[4 + j] = {_mm512_shuffle_f32x4(odd, odd_2, 0x88)};
    rows[8 + j] = {_mm512_shuffle_f32x4(even, even_2, 0xdd)};
    rows[12 + j] = {_mm512_shuffle_f32x4(odd, odd_2, 0xdd)};
  }
}

struct I32 {
  __m512i raw;
};

inline I32 set_bits(std::uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
inline I32 bits_of(F32 a) { return {_mm512_castps_si512(a.raw)}; }
inline F32 float_of(I32 a) { return {_mm512_castsi512_ps(a.raw)}; }
inline I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.raw, b.raw)}; }
inline I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.raw, b.raw)}; }
inline I32 operator*(I32 a, I32 b) { return {_mm512_mullo_epi32(a.raw, b.raw)}; }
inline I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.raw, b.raw)}; }
inline I32 operator|(I32 a, I32 b) { return {_mm512_or_si512(a.raw, b.raw)}; }
inline I32 operator^(I32 a, I32 b) { return {_mm512_xor_si512(a.raw, b.raw)}; }
template <int kBits>
inline I32 left(I32 a) {
  return {_mm512_slli_epi32(a.raw, kBits)};
}
template <int kBits>
inline I32 right(I32 a) {
  return {_mm512_srli_epi32(a.raw, kBits)};
}
template <int kBits>
inline I32 right_signed(I32 a) {
  return {_mm512_srai_epi32(a.raw, kBits)};
}
inline I32 max_signed(I32 a, I32 b) { return {_mm512_max_epi32(a.raw, b.raw)}; }
inline I32 min_signed(I32 a, I32 b) { return {_mm512_min_epi32(a.raw, b.raw)}; }
inline I32 where_nonzero(I32 test, I32 a) {
  return {_mm512_maskz_mov_epi32(_mm512_test_epi32_mask(test.raw, test.raw), a.raw)};
}
inline I32 load_words(const std::uint32_t* x) { return {_mm512_loadu_si512(x)}; }
inline I32 load_shorts(const std::int16_t* x) {
  return {_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
}
inline void store_shorts(std::int16_t* out, I32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(a.raw));
}
inline I32 load_bytes(const std::uint8_t* x) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
}
inline void store_bytes(std::uint8_t* out, I32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtusepi32_epi8(a.raw));
}
inline I32 merge(std::uint32_t mask, I32 a, I32 b) {
  return {_mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(mask)), a.raw, b.raw, 0xca)};
}
inline I32 max_unsigned(I32 a, I32 b) { return {_mm512_max_epu32(a.raw, b.raw)}; }
inline std::uint32_t largest_unsigned(I32 a) {
  const __m256i half = _mm256_max_epu32(_mm512_castsi512_si256(a.raw), _mm512_extracti64x4_epi64(a.raw, 1));
  __m128i quarter = _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  quarter = _mm_max_epu32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
  quarter = _mm_max_epu32(quarter, _mm_shuffle_epi32(quarter, 0xb1));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(quarter));
}

struct Sum16 {
  __m512d low, high;
};
inline Sum16 zero16() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }

template <class T>
inline Sum16 widen16(const T* x) {
  const __m512 v = load(x).raw;
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
}
inline void add_squares(Sum16& sum, Sum16 x) {
  sum.low = _mm512_add_pd(sum.low, _mm512_mul_pd(x.low, x.low));
  sum.high = _mm512_add_pd(sum.high, _mm512_mul_pd(x.high, x.high));
}
inline void add_magnitudes(Sum16& sum, Sum16 x) {
  sum.low = _mm512_add_pd(sum.low, _mm512_abs_pd(x.low));
  sum.high = _mm512_add_pd(sum.high, _mm512_abs_pd(x.high));
}
inline void store16(double* out, Sum16 sum) {
  _mm512_storeu_pd(out, sum.low);
  _mm512_storeu_pd(out + 8, sum.high);
}

struct WeightedWords {
  __m512i even, odd;
  __m512i weights;  // of the next 16 words
};
inline WeightedWords zero_words(std::uint32_t weight) {
  const __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(kChecksumFactor));
  const __m512i weights =
      _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(weight)), _mm512_mullo_epi32(index, factor));
  return {_mm512_setzero_si512(), _mm512_setzero_si512(), weights};
}
inline void add_words(WeightedWords& s, const unsigned char* x) {
  const __m512i words = _mm512_loadu_si512(x);
  s.even = _mm512_add_epi64(s.even, _mm512_mul_epu32(words, s.weights));
  s.odd = _mm512_add_epi64(s.odd,
                           _mm512_mul_epu32(_mm512_srli_epi64(words, 32), _mm512_srli_epi64(s.weights, 32)));
  s.weights = _mm512_add_epi32(s.weights, _mm512_set1_epi32(static_cast<int>(32 * kChecksumFactor)));
}
inline std::uint64_t total(const WeightedWords& s) {
  std::uint64_t lane[8];
  _mm512_storeu_si512(lane, _mm512_add_epi64(s.even, s.odd));
  return lane[0] + lane[1] + lane[2] + lane[3] + lane[4] + lane[5] + lane[6] + lane[7];
}
