// Activation functions, see ds/activation.h. Included by kernels-inl.h, after exp_negative.

struct ValueAndSlope {
  F32 value;
  F32 slope;
};

struct Gelu {
  // Phi(-|x|) = erfc(z) / 2 with z = |x| / sqrt(2), and erfc(z) = q(t) exp(-z^2) with t = 1 / (1 + 0.42 z). q
  // is a polynomial without constant that was fitted to exp(z^2) erfc(z) over 0 <= z <= 9.4, by least squares
  // with weights that were raised where the relative error was largest: 1.7e-7 is left.
  static ValueAndSlope at(F32 x) {
    const F32 one = set(1.0f), positive = largest(x, set(0.0f) - x);
    const F32 t = one / fused(positive, set(0.42f * 0.70710678118654752f), one);
    F32 q = set(0.070393026f);
    q = fused(q, t, set(-0.32093978f));
    q = fused(q, t, set(0.44186699f));
    q = fused(q, t, set(-0.13164301f));
    q = fused(q, t, set(0.26934379f));
    q = fused(q, t, set(0.19454041f));
    q = fused(q, t, set(0.23961622f));
    q = fused(q, t, set(0.2368222f)) * t;
    const F32 e = exp_negative(x * x * set(-0.5f));
    const F32 tail = q * e * set(0.5f);
    const F32 phi = select(sign_bits(x), tail, one - tail);
    return {x * phi, fused(x * set(0.39894228040143268f), e, phi)};
  }
};

struct Relu {
  static ValueAndSlope at(F32 x) { return {largest(x, set(0.0f)), largest(sign(x), set(0.0f))}; }
};

struct Silu {
  static ValueAndSlope at(F32 x) {
    const F32 one = set(1.0f), negative = set(0.0f) - largest(x, set(0.0f) - x);
    const F32 e = exp_negative(negative);
    const F32 small = e / (one + e), large = one / (one + e);
    const unsigned below = sign_bits(x);
    const F32 s = select(below, small, large), rest = select(below, large, small);
    return {x * s, fused(x * rest, s, s)};
  }
};

template <class Function, class T>
void activation_range(const void* x, const void* factor, void* out, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; i += kLanes) {
    F32 y = Function::at(load(static_cast<const T*>(x) + i)).value;
    if (factor != nullptr) y = y * load(static_cast<const T*>(factor) + i);
    store(static_cast<T*>(out) + i, y);
  }
}

template <class Function, class T>
void activation_grad_range(const ActivationGrads& g, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; i += kLanes) {
    const ValueAndSlope f = Function::at(load(static_cast<const T*>(g.x) + i));
    F32 grad = load(static_cast<const T*>(g.grad) + i), out = f.value;
    if (g.factor != nullptr) {
      const F32 factor = load(static_cast<const T*>(g.factor) + i);
      store(static_cast<T*>(g.dfactor) + i, grad * f.value);
      grad = grad * factor;
      out = out * factor;
    }
    store(static_cast<T*>(g.dx) + i, grad * f.slope);
    store(static_cast<T*>(g.out) + i, out);
  }
}
