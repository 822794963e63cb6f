// The optimizers' formulas over one contiguous range. Included per target.

template <class State, class Grad, class Out>
void adam_range(const AdamScalars& scalars, float* param, void* exp_avg, void* exp_avg_sq, const void* grad,
                void* out, std::int64_t numel) {
  const AdamFactors k = adam_factors(scalars);
  auto step = [&](float* p, State* m, State* v, const Grad* g, Out* o) {
    F32 m_now = load(m);
    F32 v_now = load(v);
    const F32 p_now = adam_update(k, load(p), m_now, v_now, load(g));
    store(m, m_now);
    store(v, v_now);
    store(p, p_now);
    store(o, p_now);
  };
  sweep(numel, step, param, static_cast<State*>(exp_avg), static_cast<State*>(exp_avg_sq),
        static_cast<const Grad*>(grad), static_cast<Out*>(out));
}

// Adagrad, Lion and SGD: one state at most.
template <class Scalars, class State, class Grad, class Out>
void one_state_range(const Scalars& scalars, float* param, void* state, const void* grad, void* out,
                     std::int64_t numel) {
  const auto k = factors_of(scalars);
  auto step = [&](float* p, State* s, const Grad* g, Out* o) {
    F32 s_now = load(s);
    const F32 p_now = update(k, load(p), s_now, load(g));
    store(s, s_now);
    store(p, p_now);
    store(o, p_now);
  };
  sweep(numel, step, param, static_cast<State*>(state), static_cast<const Grad*>(grad),
        static_cast<Out*>(out));
}

// At most one block of ds/norm.h, so that the sums are the fixed ones.
template <class State, class Grad>
void lamb_moments_range(const LambScalars& scalars, const float* param, void* exp_avg, void* exp_avg_sq,
                        const void* grad, LambNorms* norms, std::int64_t numel) {
  constexpr std::int64_t kTile = 512;
  const LambFactors k = lamb_factors(scalars);
  auto* ms = static_cast<State*>(exp_avg);
  auto* vs = static_cast<State*>(exp_avg_sq);
  const auto* gs = static_cast<const Grad*>(grad);
  auto step = [&](const float* p, State* m, State* v, const Grad* g, float* u) {
    F32 m_now = load(m);
    F32 v_now = load(v);
    lamb_moments(k, m_now, v_now, load(g));
    store(m, m_now);
    store(v, v_now);
    store(u, lamb_direction(k, load(p), load(m), load(v)));  // what the second pass will read back
  };
  Sum16 param_sum = zero16();
  Sum16 direction_sum = zero16();
  float direction[kTile];
  for (std::int64_t i = 0; i < numel; i += kTile) {
    const std::int64_t n = numel - i < kTile ? numel - i : kTile;
    sweep(n, step, param + i, ms + i, vs + i, gs + i, static_cast<float*>(direction));
    sum_squares_into(param_sum, param + i, n);
    sum_squares_into(direction_sum, static_cast<const float*>(direction), n);
  }
  norms->param_squared = tree_sum(param_sum);
  norms->direction_squared = tree_sum(direction_sum);
}

template <class State, class Out>
void lamb_apply_range(const LambScalars& scalars, float minus_step, float* param, const void* exp_avg,
                      const void* exp_avg_sq, void* out, std::int64_t numel) {
  const LambFactors k = lamb_factors(scalars);
  const F32 minus = set(minus_step);
  auto step = [&](float* p, const State* m, const State* v, Out* o) {
    const F32 p_old = load(p);
    const F32 p_now = p_old + minus * lamb_direction(k, p_old, load(m), load(v));
    store(p, p_now);
    store(o, p_now);
  };
  sweep(numel, step, param, static_cast<const State*>(exp_avg), static_cast<const State*>(exp_avg_sq),
        static_cast<Out*>(out));
}
