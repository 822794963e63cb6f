#include "ds/lamb.h"

#include <cmath>

#include "check.h"
#include "ds/norm.h"

using namespace ds;
using namespace ds::check;

TEST(two_passes_match_the_formula_and_the_norm_kernel) {
  const LambOptions o{.step = 4, .lr = 0.01, .weight_decay = 0.1, .grad_scale = 0.5};
  const std::size_t n = 3 * kNormBlock + 777;
  const std::vector<float> g0 = random_floats(n, 1);
  std::vector<float> p = random_floats(n, 2), m = random_floats(n, 3), v = random_floats(n, 4), u(n);
  for (float& x : v) x = std::fabs(x);
  const std::vector<float> p0 = p, m0 = m, v0 = v;
  const auto f = [](double x) { return static_cast<float>(x); };
  for (std::size_t i = 0; i < n; ++i) {
    const float g = g0[i] * f(o.grad_scale);
    m[i] = m[i] * f(o.beta1) + f(1.0 - o.beta1) * g;
    v[i] = v[i] * f(o.beta2) + (f(1.0 - o.beta2) * g) * g;
    const float root = std::sqrt(v[i]) * f(1.0 / std::sqrt(1.0 - std::pow(o.beta2, 4.0))) + f(o.eps);
    u[i] = (m[i] * f(1.0 / (1.0 - std::pow(o.beta1, 4.0)))) / root + f(o.weight_decay) * p[i];
    p[i] = p[i] + -0.25f * u[i];
  }
  const NormTensor p_norm{p0.data(), static_cast<std::int64_t>(n), DType::kF32};
  const NormTensor u_norm{u.data(), static_cast<std::int64_t>(n), DType::kF32};
  for_each_target([&] {
    std::vector<float> p1 = p0, m1 = m0, v1 = v0;
    const UpdateTensor t[] = {
        {p1.data(), {m1.data(), v1.data()}, g0.data(), nullptr, 0, {}, {}, {}},  // an empty segment has norm
                                                                                 // 0
        {p1.data(), {m1.data(), v1.data()}, g0.data(), nullptr, static_cast<std::int64_t>(n), {}, {}, {}}};
    LambNorms norms[2];
    lamb_moments(o, t, norms, 2);
    CHECK(m1 == m);
    CHECK(v1 == v);
    CHECK_EQ(norms[0].param_squared, 0.0);
    CHECK_EQ(norms[1].param_squared, squared_norm({&p_norm, 1}, 1).sum);
    CHECK_EQ(norms[1].direction_squared, squared_norm({&u_norm, 1}, 1).sum);
    const float minus_steps[] = {0.0f, -0.25f};
    lamb_apply(o, t, minus_steps, 2);
    CHECK(p1 == p);
  });
}
