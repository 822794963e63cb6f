#include "ds/adagrad.h"

#include <cmath>

#include "check.h"

using namespace ds;
using namespace ds::check;

TEST(matches_the_formula_bit_by_bit) {
  const AdagradOptions o{
      .step = 3, .lr = 0.1, .lr_decay = 0.01, .eps = 1e-10, .weight_decay = 0.2, .grad_scale = 0.7};
  const std::size_t n = 40'001;
  const std::vector<float> g0 = random_floats(n, 1);
  std::vector<float> p = random_floats(n, 2), sum = random_floats(n, 3);
  for (float& x : sum) x = std::fabs(x);
  const std::vector<float> p0 = p, sum0 = sum;
  const auto minus_lr = static_cast<float>(-o.lr / (1.0 + 2 * o.lr_decay));
  for (std::size_t i = 0; i < n; ++i) {
    const float g = g0[i] * static_cast<float>(o.grad_scale) + static_cast<float>(o.weight_decay) * p[i];
    sum[i] = sum[i] + g * g;
    p[i] = p[i] + (minus_lr * g) / (std::sqrt(sum[i]) + static_cast<float>(o.eps));
  }
  for_each_target([&] {
    std::vector<float> p1 = p0, sum1 = sum0;
    const UpdateTensor t{
        p1.data(), {sum1.data(), nullptr}, g0.data(), nullptr, static_cast<std::int64_t>(n), {}, {}, {}};
    adagrad_step(o, {&t, 1}, 2);
    CHECK(p1 == p);
    CHECK(sum1 == sum);
  });
}
