// Adam and AdamW on one vector; the formula stands in ds/adam.h. Included per target, and by the GPU kernels:
// every operation of F32 is one IEEE operation, so all of them compute the same bits.

struct AdamFactors {
  F32 grad_scale, l2, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_bias2_sqrt, eps,
      minus_step_size;
  bool has_l2;
};

DS_INLINE AdamFactors adam_factors(const AdamScalars& s) {
  return {set(s.grad_scale),
          set(s.l2),
          set(s.decay),
          set(s.beta1),
          set(s.one_minus_beta1),
          set(s.beta2),
          set(s.one_minus_beta2),
          set(s.inv_bias2_sqrt),
          set(s.eps),
          set(s.minus_step_size),
          s.l2 != 0.0f};
}

// Updates exp_avg and exp_avg_sq, returns the new parameter.
DS_INLINE F32 adam_update(const AdamFactors& k, F32 param, F32& exp_avg, F32& exp_avg_sq, F32 grad) {
  grad = grad * k.grad_scale;
  if (k.has_l2) grad = grad + k.l2 * param;
  param = param * k.decay;
  exp_avg = exp_avg * k.beta1 + k.one_minus_beta1 * grad;
  exp_avg_sq = exp_avg_sq * k.beta2 + (k.one_minus_beta2 * grad) * grad;
  return param + (k.minus_step_size * exp_avg) / (sqrt(exp_avg_sq) * k.inv_bias2_sqrt + k.eps);
}
