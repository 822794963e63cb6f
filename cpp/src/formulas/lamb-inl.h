// LAMB on one vector; the formulas stand in ds/lamb.h. Included as adam-inl.h is.

struct LambFactors {
  F32 grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_bias1, inv_bias2_sqrt, eps,
      weight_decay;
};

DS_INLINE LambFactors lamb_factors(const LambScalars& s) {
  return {set(s.grad_scale),      set(s.beta1),     set(s.one_minus_beta1), set(s.beta2),
          set(s.one_minus_beta2), set(s.inv_bias1), set(s.inv_bias2_sqrt),  set(s.eps),
          set(s.weight_decay)};
}

DS_INLINE void lamb_moments(const LambFactors& k, F32& exp_avg, F32& exp_avg_sq, F32 grad) {
  grad = grad * k.grad_scale;
  exp_avg = exp_avg * k.beta1 + k.one_minus_beta1 * grad;
  exp_avg_sq = exp_avg_sq * k.beta2 + (k.one_minus_beta2 * grad) * grad;
}

// The direction, whose length the trust ratio sets.
DS_INLINE F32 lamb_direction(const LambFactors& k, F32 param, F32 exp_avg, F32 exp_avg_sq) {
  const F32 adam = (exp_avg * k.inv_bias1) / (sqrt(exp_avg_sq) * k.inv_bias2_sqrt + k.eps);
  return adam + k.weight_decay * param;
}
