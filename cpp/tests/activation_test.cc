#include "ds/activation.h"

#include <algorithm>
#include <cmath>

#include "check.h"

using namespace ds;
using namespace ds::check;

namespace {

double value(Activation function, double x) {
  if (function == Activation::kRelu) return std::max(x, 0.0);
  if (function == Activation::kSilu) return x / (1.0 + std::exp(-x));
  return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
}

double slope(Activation function, double x) {
  if (function == Activation::kRelu) return x > 0.0 ? 1.0 : 0.0;
  if (function == Activation::kSilu) {
    const double s = 1.0 / (1.0 + std::exp(-x));
    return s * (1.0 + x * (1.0 - s));
  }
  return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-x * x / 2.0) / std::sqrt(2.0 * M_PI);
}

}  // namespace

TEST(values_and_slopes_within_the_bound) {
  std::vector<float> x(4096), factor = random_floats(x.size(), 1), grad = random_floats(x.size(), 2);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = -16.0f + static_cast<float>(i) / 128.0f;
  x[0] = -1000.0f;
  x[1] = 1000.0f;
  x[2] = -0.0f;
  for (const Activation function : {Activation::kGelu, Activation::kRelu, Activation::kSilu}) {
    const ActivationJob job = {function, DType::kF32, static_cast<std::int64_t>(x.size())};
    for_each_target([&] {
      std::vector<float> out(x.size()), dx(x.size()), dfactor(x.size()), again(x.size());
      activation(job, x.data(), factor.data(), out.data(), 2);
      activation_grad(job, grad.data(), x.data(), factor.data(), dx.data(), dfactor.data(), again.data(), 2);
      CHECK(out == again);
      for (std::size_t i = 0; i < x.size(); ++i) {
        const double at = x[i], f = factor[i], g = grad[i], bound = 0x1p-20 * std::max(1.0, std::abs(at));
        CHECK(std::abs(out[i] - value(function, at) * f) <= bound * std::abs(f));
        CHECK(std::abs(dfactor[i] - value(function, at) * g) <= bound * std::abs(g));
        CHECK(std::abs(dx[i] - slope(function, at) * f * g) <= bound * std::abs(f * g));
      }
      activation(job, x.data(), nullptr, out.data(), 1);
      for (std::size_t i = 0; i < x.size(); ++i) {
        CHECK(std::abs(out[i] - value(function, x[i])) <= 0x1p-20 * std::max(1.0, std::abs(double{x[i]})));
      }
    });
  }
}
