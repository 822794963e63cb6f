#include "ds/lion.h"

#include <cmath>

#include "check.h"

using namespace ds;
using namespace ds::check;

TEST(matches_the_formula_bit_by_bit) {
  const LionOptions o{.lr = 0.01, .weight_decay = 0.3, .grad_scale = 0.7};
  const std::size_t n = 40'001;
  std::vector<float> g0 = random_floats(n, 1);
  std::vector<float> p = random_floats(n, 2), m = random_floats(n, 3);
  g0[5] = m[5] = 0.0f;  // no direction, no step
  g0[6] = NAN;          // sign(NaN) is 0, and the momentum becomes NaN
  const std::vector<float> p0 = p, m0 = m;
  const auto f = [](double x) { return static_cast<float>(x); };
  for (std::size_t i = 0; i < n; ++i) {
    const float g = g0[i] * f(o.grad_scale);
    const float d = m[i] * f(o.beta1) + f(1.0 - o.beta1) * g;
    m[i] = m[i] * f(o.beta2) + f(1.0 - o.beta2) * g;
    p[i] = p[i] * f(1.0 - o.lr * o.weight_decay) + f(-o.lr) * static_cast<float>((d > 0) - (d < 0));
  }
  CHECK(std::isnan(m[6]) && !std::isnan(p[6]));
  for_each_target([&] {
    std::vector<float> p1 = p0, m1 = m0;
    const UpdateTensor t{
        p1.data(), {m1.data(), nullptr}, g0.data(), nullptr, static_cast<std::int64_t>(n), {}, {}, {}};
    lion_step(o, {&t, 1}, 2);
    CHECK(p1 == p);
    for (std::size_t i = 0; i < n; ++i) CHECK(same(m1[i], m[i]));
  });
}
