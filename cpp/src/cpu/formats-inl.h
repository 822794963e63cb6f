// Conversions between fp32 and the formats of ds/formats.h. Included per target.

// [Note: split masters]
inline I32 rounded_away(I32 bits) {
  const I32 beyond =
      right_signed<31>(set_bits(0x7f800000u) - (bits & set_bits(0x7fffffffu)));  // NaN: all ones
  const I32 quiet = (bits & set_bits(0x80000000u)) | set_bits(0x7fc00000u);
  return where_nonzero(beyond ^ set_bits(0xffffffffu), bits) | (quiet & beyond);
}

inline F32 join(const BF16* high, const std::int16_t* low) {
  return float_of(bits_of(load(high)) + load_shorts(low));
}
inline void split(F32 x, BF16* high, std::int16_t* low) {
  const I32 bits = rounded_away(bits_of(x));
  store_shorts(reinterpret_cast<std::int16_t*>(high), right<16>(bits + set_bits(0x8000u)));
  store_shorts(low, bits);
}

inline void join_master(const BF16* high, const std::int16_t* low, float* out, std::int64_t numel) {
  auto step = [](const BF16* h, const std::int16_t* l, float* o) { store(o, join(h, l)); };
  sweep(numel, step, high, low, out);
}

inline void split_master(const float* x, BF16* high, std::int16_t* low, std::int64_t numel) {
  auto step = [](const float* from, BF16* h, std::int16_t* l) { split(load(from), h, l); };
  sweep(numel, step, x, high, low);
}

inline void round_away(const float* x, BF16* out, std::int64_t numel) {
  auto step = [](const float* from, BF16* to) {
    const I32 bits = rounded_away(bits_of(load(from)));
    store_shorts(reinterpret_cast<std::int16_t*>(to), right<16>(bits + set_bits(0x8000u)));
  };
  sweep(numel, step, x, out);
}

// [Note: stochastic rounding]
inline void round_stochastically(const float* x, BF16* out, std::uint32_t key, std::int64_t numel) {
  const I32 keys = set_bits(key);
  auto step = [&](const float* from, BF16* to) {
    const I32 bits = bits_of(load(from));
    I32 hash = (bits + keys) * set_bits(0x9e3779b1u);
    hash = (hash ^ right<15>(hash)) * set_bits(0x85ebca77u);
    const I32 beyond = right_signed<31>(set_bits(0x7f800000u) - (bits & set_bits(0x7fffffffu)));
    const I32 high = right<16>(bits + where_nonzero(beyond ^ set_bits(0xffffffffu), right<16>(hash)));
    store_shorts(reinterpret_cast<std::int16_t*>(to), high | (beyond & set_bits(0x40u)));
  };
  sweep(numel, step, x, out);
}

// Adam on split masters with fp32 states, without a buffer in between: 26 bytes an element with bf16
// gradients.
template <class Grad>
void adam_split_range(const AdamScalars& scalars, BF16* high, std::int16_t* low, float* exp_avg,
                      float* exp_avg_sq, const void* grad, std::int64_t numel) {
  const AdamFactors k = adam_factors(scalars);
  auto step = [&](BF16* h, std::int16_t* l, float* m, float* v, const Grad* g) {
    F32 m_now = load(m);
    F32 v_now = load(v);
    split(adam_update(k, join(h, l), m_now, v_now, load(g)), h, l);
    store(m, m_now);
    store(v, v_now);
  };
  sweep(numel, step, high, low, exp_avg, exp_avg_sq, static_cast<const Grad*>(grad));
}
