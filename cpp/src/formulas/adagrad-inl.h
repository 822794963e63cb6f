// Adagrad on one vector; the formula stands in ds/adagrad.h. Included as adam-inl.h is.

struct AdagradFactors {
  F32 grad_scale, l2, eps, minus_lr;
  bool has_l2;
};

DS_INLINE AdagradFactors factors_of(const AdagradScalars& s) {
  return {set(s.grad_scale), set(s.l2), set(s.eps), set(s.minus_lr), s.l2 != 0.0f};
}

DS_INLINE F32 update(const AdagradFactors& k, F32 param, F32& sum, F32 grad) {
  grad = grad * k.grad_scale;
  if (k.has_l2) grad = grad + k.l2 * param;
  sum = sum + grad * grad;
  return param + (k.minus_lr * grad) / (sqrt(sum) + k.eps);
}
