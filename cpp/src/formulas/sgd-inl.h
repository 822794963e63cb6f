// SGD with momentum on one vector; the formula stands in ds/sgd.h. Included as adam-inl.h is.

struct SgdFactors {
  F32 grad_scale, l2, momentum, one_minus_dampening, minus_lr;
  bool has_l2, has_momentum, first, nesterov;
};

DS_INLINE SgdFactors factors_of(const SgdScalars& s) {
  return {set(s.grad_scale), set(s.l2),    set(s.momentum), set(s.one_minus_dampening),
          set(s.minus_lr),   s.l2 != 0.0f, s.has_momentum,  s.first,
          s.nesterov};
}

DS_INLINE F32 update(const SgdFactors& k, F32 param, F32& buffer, F32 grad) {
  grad = grad * k.grad_scale;
  if (k.has_l2) grad = grad + k.l2 * param;
  if (k.has_momentum) {
    buffer = k.first ? grad : buffer * k.momentum + k.one_minus_dampening * grad;
    grad = k.nesterov ? grad + k.momentum * buffer : buffer;
  }
  return param + k.minus_lr * grad;
}
