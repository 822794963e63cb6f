// bf16 and fp16 to fp32 and back in integer arithmetic: for the CPU baseline and for GPUs. Narrowing rounds
// to nearest even; a NaN becomes quiet and keeps its sign and upper payload bits, as the CPU's instructions
// do it.

DS_INLINE std::uint32_t bits_of(float x) { return __builtin_bit_cast(std::uint32_t, x); }
DS_INLINE float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

DS_INLINE float widen(float x) { return x; }
DS_INLINE float widen(BF16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }
DS_INLINE float widen(F16 x) {
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

DS_INLINE void narrow(float* out, float x) { *out = x; }
DS_INLINE void narrow(BF16* out, float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (bits >> 16) | 0x40u;
  out->bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
DS_INLINE void narrow(F16* out, float x) {
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
