// Lion on one vector; the formula stands in ds/lion.h. Included as adam-inl.h is.

struct LionFactors {
  F32 grad_scale, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, minus_lr;
};

DS_INLINE LionFactors factors_of(const LionScalars& s) {
  return {set(s.grad_scale), set(s.decay),           set(s.beta1),   set(s.one_minus_beta1),
          set(s.beta2),      set(s.one_minus_beta2), set(s.minus_lr)};
}

DS_INLINE F32 update(const LionFactors& k, F32 param, F32& exp_avg, F32 grad) {
  grad = grad * k.grad_scale;
  const F32 direction = sign(exp_avg * k.beta1 + k.one_minus_beta1 * grad);
  exp_avg = exp_avg * k.beta2 + k.one_minus_beta2 * grad;
  return param * k.decay + k.minus_lr * direction;
}
