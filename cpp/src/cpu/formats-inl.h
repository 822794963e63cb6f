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
DS_INLINE void store_stochastically(BF16* out, F32 x, I32 key) {
  const I32 bits = bits_of(x);
  I32 hash = (bits + key) * set_bits(0x9e3779b1u);
  hash = (hash ^ right<15>(hash)) * set_bits(0x85ebca77u);
  const I32 beyond = right_signed<31>(set_bits(0x7f800000u) - (bits & set_bits(0x7fffffffu)));
  const I32 high = right<16>(bits + where_nonzero(beyond ^ set_bits(0xffffffffu), right<16>(hash)));
  store_shorts(reinterpret_cast<std::int16_t*>(out), high | (beyond & set_bits(0x40u)));
}

inline void round_stochastically(const float* x, BF16* out, std::uint32_t key, std::int64_t numel) {
  const I32 keys = set_bits(key);
  auto step = [&](const float* from, BF16* to) { store_stochastically(to, load(from), keys); };
  sweep(numel, step, x, out);
}

// Adam without a buffer in between, for parameters and states in the formats of ds/formats.h: a parameter
// with or without master bits, states in fp32 or in bf16 that is rounded stochastically.
DS_INLINE F32 load_param(const float* param, const Absent*) { return load(param); }
DS_INLINE F32 load_param(const BF16* param, const Absent*) { return load(param); }
DS_INLINE F32 load_param(const BF16* param, const std::int16_t* low) { return join(param, low); }
DS_INLINE void store_param(float* param, Absent*, F32 x) { store(param, x); }
DS_INLINE void store_param(BF16* param, Absent*, F32 x) { store(param, x); }
DS_INLINE void store_param(BF16* param, std::int16_t* low, F32 x) { split(x, param, low); }
DS_INLINE void store_moment(float* out, F32 x, I32) { store(out, x); }
DS_INLINE void store_moment(BF16* out, F32 x, I32 key) { store_stochastically(out, x, key); }

template <class Param, class Low, class State, class Grad, class Out>
void adam_formatted_range(const AdamScalars& scalars, void* param, std::int16_t* low, void* exp_avg,
                          void* exp_avg_sq, const void* grad, void* out, const RoundingKeys& keys,
                          std::int64_t numel) {
  const AdamFactors k = adam_factors(scalars);
  const I32 key_m = set_bits(keys.state[0]);
  const I32 key_v = set_bits(keys.state[1]);
  auto step = [&](Param* p, Low* l, State* m, State* v, const Grad* g, Out* o) {
    F32 m_now = load(m);
    F32 v_now = load(v);
    const F32 p_now = adam_update(k, load_param(p, l), m_now, v_now, load(g));
    store_moment(m, m_now, key_m);
    store_moment(v, v_now, key_v);
    store_param(p, l, p_now);
    store(o, p_now);
  };
  sweep(numel, step, static_cast<Param*>(param), reinterpret_cast<Low*>(low), static_cast<State*>(exp_avg),
        static_cast<State*>(exp_avg_sq), static_cast<const Grad*>(grad), static_cast<Out*>(out));
}
