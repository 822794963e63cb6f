#include "ds/adam.h"

#include <cmath>

#include "check.h"

using namespace ds;
using namespace ds::check;

namespace {

struct Case {
  std::vector<float> p, m, v, g;
};

Case make(std::size_t n) {
  Case c{random_floats(n, 1), random_floats(n, 2), random_floats(n, 3), random_floats(n, 4)};
  for (float& x : c.v) x = std::fabs(x);
  return c;
}

// The formula of ds/adam.h, one element at a time.
void oracle(const AdamOptions& o, Case& c) {
  const auto f = [](double x) { return static_cast<float>(x); };
  const double bias1 = 1.0 - std::pow(o.beta1, static_cast<double>(o.step));
  const double bias2 = 1.0 - std::pow(o.beta2, static_cast<double>(o.step));
  for (std::size_t i = 0; i < c.p.size(); ++i) {
    float g = c.g[i] * f(o.grad_scale);
    if (o.decoupled) {
      c.p[i] = c.p[i] * f(1.0 - o.lr * o.weight_decay);
    } else {
      g = g + f(o.weight_decay) * c.p[i];
    }
    c.m[i] = c.m[i] * f(o.beta1) + f(1.0 - o.beta1) * g;
    c.v[i] = c.v[i] * f(o.beta2) + (f(1.0 - o.beta2) * g) * g;
    const float root = std::sqrt(c.v[i]) * f(1.0 / std::sqrt(bias2)) + f(o.eps);
    c.p[i] = c.p[i] + (f(-o.lr / bias1) * c.m[i]) / root;
  }
}

UpdateTensor tensor(Case& c, std::size_t begin, std::size_t end) {
  return {c.p.data() + begin,
          {c.m.data() + begin, c.v.data() + begin},
          c.g.data() + begin,
          nullptr,
          static_cast<std::int64_t>(end - begin),
          DType::kF32,
          DType::kF32,
          DType::kF32};
}

const AdamOptions kOptions{.step = 7, .lr = 1e-2, .eps = 1e-8, .weight_decay = 0.1, .grad_scale = 0.3};

}  // namespace

TEST(matches_the_formula_bit_by_bit) {
  for (const bool decoupled : {true, false}) {
    AdamOptions options = kOptions;
    options.decoupled = decoupled;
    Case expected = make(100'003);
    oracle(options, expected);
    for_each_target([&] {
      Case actual = make(100'003);
      const UpdateTensor t = tensor(actual, 0, actual.p.size());
      adam_step(options, {&t, 1}, 2);
      CHECK(actual.p == expected.p);
      CHECK(actual.m == expected.m);
      CHECK(actual.v == expected.v);
    });
  }
}

TEST(cuts_do_not_change_bits) {
  Case expected = make(5000);
  oracle(kOptions, expected);
  for_each_target([&] {
    Case actual = make(5000);
    std::vector<UpdateTensor> pieces;
    std::size_t begin = 0;
    for (const std::size_t length : {1u, 2u, 3u, 15u, 0u, 16u, 17u, 63u, 1000u}) {
      pieces.push_back(tensor(actual, begin, begin + length));
      begin += length;
    }
    pieces.push_back(tensor(actual, begin, actual.p.size()));
    adam_step(kOptions, pieces, 2);
    CHECK(actual.p == expected.p);
    CHECK(actual.v == expected.v);
  });
}

TEST(reads_bf16_and_writes_a_copy_in_the_same_pass) {
  for_each_target([&] {
    Case actual = make(1001);
    std::vector<BF16> half = to_bf16(actual.g);
    for (std::size_t i = 0; i < half.size(); ++i) actual.g[i] = widen(half[i]);
    Case expected = actual;
    oracle(kOptions, expected);
    std::vector<BF16> out(1001);
    UpdateTensor t = tensor(actual, 0, 1001);
    t.grad = half.data();
    t.grad_dtype = DType::kBF16;
    t.out = out.data();
    t.out_dtype = DType::kBF16;
    adam_step(kOptions, {&t, 1}, 1);
    CHECK(actual.p == expected.p);
    for (std::size_t i = 0; i < out.size(); ++i) {
      CHECK(std::fabs(widen(out[i]) - actual.p[i]) <= std::ldexp(std::fabs(actual.p[i]), -8));
    }
  });
}
