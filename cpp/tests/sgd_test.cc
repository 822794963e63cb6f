#include "ds/sgd.h"

#include "check.h"

using namespace ds;
using namespace ds::check;

namespace {

void run(const SgdOptions& o) {
  const std::size_t n = 40'001;
  const std::vector<float> g0 = random_floats(n, 1);
  std::vector<float> p = random_floats(n, 2), b = random_floats(n, 3);
  const std::vector<float> p0 = p, b0 = b;
  const auto f = [](double x) { return static_cast<float>(x); };
  for (std::size_t i = 0; i < n; ++i) {
    float g = g0[i] * f(o.grad_scale);
    if (o.weight_decay != 0.0) g = g + f(o.weight_decay) * p[i];
    if (o.momentum != 0.0) {
      b[i] = o.first ? g : b[i] * f(o.momentum) + f(1.0 - o.dampening) * g;
      g = o.nesterov ? g + f(o.momentum) * b[i] : b[i];
    }
    p[i] = p[i] + f(-o.lr) * g;
  }
  for_each_target([&] {
    std::vector<float> p1 = p0, b1 = b0;
    void* buffer = o.momentum == 0.0 ? nullptr : b1.data();
    const UpdateTensor t{
        p1.data(), {buffer, nullptr}, g0.data(), nullptr, static_cast<std::int64_t>(n), {}, {}, {}};
    sgd_step(o, {&t, 1}, 2);
    CHECK(p1 == p);
    CHECK(b1 == b);
  });
}

}  // namespace

TEST(plain) { run({.lr = 0.1, .weight_decay = 0.01, .grad_scale = 0.5}); }
TEST(first_step_sets_the_buffer) { run({.first = true, .lr = 0.1, .momentum = 0.9, .dampening = 0.5}); }
TEST(momentum_and_dampening) { run({.first = false, .lr = 0.1, .momentum = 0.9, .dampening = 0.5}); }
TEST(nesterov) { run({.first = false, .lr = 0.1, .momentum = 0.9, .weight_decay = 0.1, .nesterov = true}); }
