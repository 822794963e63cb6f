#include "ds/grouped.h"

#include <cmath>
#include <functional>

#include "check.h"

using namespace ds;
using namespace ds::check;

namespace {

const std::vector<std::int64_t> kSizes = {7, 0, 1, 13};
constexpr std::int64_t kGroups = 4, kRows = 21, kInputs = 80, kOutputs = 48;
constexpr double kUnit = 0x1p-24;

std::size_t group_of(std::int64_t row) {
  std::size_t g = 0;
  for (std::int64_t end = kSizes[0]; row >= end; end += kSizes[++g]) {
  }
  return g;
}

struct Sum {
  double value = 0.0, magnitude = 0.0, terms = 1.0;
  void add(double term) {
    value += term;
    magnitude += std::abs(term);
    terms += 1.0;
  }
  // [Note: order of sums of grouped products]
  double bound() const { return terms * kUnit / (1.0 - terms * kUnit) * magnitude; }
};

struct Data {
  std::vector<float> x = random_floats(kRows * kInputs, 1),
                     weight = random_floats(kGroups * kOutputs * kInputs, 2);
  std::vector<float> bias = random_floats(kGroups * kOutputs, 3), grad = random_floats(kRows * kOutputs, 4);
};

// `sum_at(i)` for every element of `actual`.
void check_sums(const std::vector<float>& actual, const std::function<Sum(std::int64_t)>& sum_at) {
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const Sum sum = sum_at(static_cast<std::int64_t>(i));
    CHECK(std::abs(static_cast<double>(actual[i]) - sum.value) <= sum.bound());
  }
}

double product(float a, float b) { return static_cast<double>(a) * static_cast<double>(b); }

}  // namespace

TEST(products_of_each_expert_within_the_bound) {
  const Data data;
  const GroupedLinear job = {kSizes.data(), kGroups, kInputs, kOutputs, DType::kF32};
  for_each_target([&] {
    std::vector<float> first;
    for (const int threads : {1, 3}) {
      std::vector<float> out(kRows * kOutputs), dx(kRows * kInputs), dw(kGroups * kOutputs * kInputs, 7.0f);
      std::vector<float> dbias(kGroups * kOutputs, 7.0f);
      grouped_linear(job, data.x.data(), data.weight.data(), data.bias.data(), out.data(), threads);
      grouped_linear_grad_input(job, data.grad.data(), data.weight.data(), dx.data(), threads);
      grouped_linear_grad_weight(job, data.grad.data(), data.x.data(), dw.data(), dbias.data(), threads);
      check_sums(out, [&](std::int64_t at) {
        const std::int64_t row = at / kOutputs,
                           output = static_cast<std::int64_t>(group_of(row)) * kOutputs + at % kOutputs;
        Sum sum;
        sum.add(static_cast<double>(data.bias[output]));
        for (std::int64_t i = 0; i < kInputs; ++i)
          sum.add(product(data.x[row * kInputs + i], data.weight[output * kInputs + i]));
        return sum;
      });
      check_sums(dx, [&](std::int64_t at) {
        const std::int64_t row = at / kInputs, i = at % kInputs;
        const std::int64_t begin = static_cast<std::int64_t>(group_of(row)) * kOutputs;
        Sum sum;
        for (std::int64_t o = 0; o < kOutputs; ++o)
          sum.add(product(data.grad[row * kOutputs + o], data.weight[(begin + o) * kInputs + i]));
        return sum;
      });
      const auto over_rows = [&](std::int64_t output, std::int64_t input) {  // input -1: the bias
        Sum sum;
        for (std::int64_t row = 0; row < kRows; ++row) {
          if (static_cast<std::int64_t>(group_of(row)) != output / kOutputs) continue;
          const float other = input < 0 ? 1.0f : data.x[row * kInputs + input];
          sum.add(product(data.grad[row * kOutputs + output % kOutputs], other));
        }
        return sum;
      };
      check_sums(dw, [&](std::int64_t at) { return over_rows(at / kInputs, at % kInputs); });
      check_sums(dbias, [&](std::int64_t at) { return over_rows(at, -1); });
      if (threads == 1) first = out;
      CHECK(out == first);
    }
  });
}

TEST(bits_of_a_row_do_not_depend_on_other_rows) {
  const Data data;
  for_each_target([&] {
    std::vector<float> out(kRows * kOutputs), alone(kOutputs);
    grouped_linear({kSizes.data(), kGroups, kInputs, kOutputs, DType::kF32}, data.x.data(),
                   data.weight.data(), data.bias.data(), out.data(), 1);
    for (std::int64_t row = 0; row < kRows; ++row) {
      std::vector<std::int64_t> sizes(kGroups, 0);
      sizes[group_of(row)] = 1;
      grouped_linear({sizes.data(), kGroups, kInputs, kOutputs, DType::kF32}, data.x.data() + row * kInputs,
                     data.weight.data(), data.bias.data(), alone.data(), 1);
      for (std::int64_t o = 0; o < kOutputs; ++o) CHECK(same(alone[o], out[row * kOutputs + o]));
    }
  });
}

TEST(bf16_is_the_fp32_product_rounded_once) {
  const Data data;
  const auto x = to_bf16(data.x), weight = to_bf16(data.weight), bias = to_bf16(data.bias);
  const auto wide = [](const std::vector<BF16>& from) {
    std::vector<float> to;
    for (const BF16 value : from) to.push_back(widen(value));
    return to;
  };
  const auto wide_x = wide(x), wide_weight = wide(weight), wide_bias = wide(bias);
  for_each_target([&] {
    std::vector<BF16> out(kRows * kOutputs);
    std::vector<float> expected(kRows * kOutputs);
    grouped_linear({kSizes.data(), kGroups, kInputs, kOutputs, DType::kBF16}, x.data(), weight.data(),
                   bias.data(), out.data(), 2);
    grouped_linear({kSizes.data(), kGroups, kInputs, kOutputs, DType::kF32}, wide_x.data(),
                   wide_weight.data(), wide_bias.data(), expected.data(), 1);
    for (std::size_t i = 0; i < out.size(); ++i)
      CHECK(std::abs(widen(out[i]) - expected[i]) <= 0x1p-8f * std::abs(expected[i]));
  });
}
