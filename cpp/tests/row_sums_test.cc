#include "ds/row_sums.h"

#include <cmath>

#include "check.h"

using namespace ds;
using namespace ds::check;

namespace {

constexpr std::int64_t kSums = 3, kChoices = 2, kRows = 5, kColumns = 48;
const std::vector<std::int64_t> kIndex = {4, 0, 5, 2, 1, 3};  // the first choice of sum 1 was dropped

}  // namespace

TEST(weighted_sums_and_their_gradients) {
  const auto rows = random_floats(kRows * kColumns, 1), weights = random_floats(kSums * kChoices, 2);
  const auto grad = random_floats(kSums * kColumns, 3);
  const RowSums job = {kIndex.data(), kSums, kChoices, kRows, kColumns, DType::kF32};
  for_each_target([&] {
    std::vector<float> out(kSums * kColumns), plain(out.size()), drows(rows.size()),
        dweights(weights.size(), 7.0f);
    row_sums(job, rows.data(), weights.data(), out.data(), 2);
    row_sums(job, rows.data(), nullptr, plain.data(), 1);
    row_sums_grad(job, grad.data(), rows.data(), weights.data(), drows.data(), dweights.data(), 2);
    for (std::int64_t s = 0; s < kSums; ++s) {
      for (std::int64_t k = 0; k < kChoices; ++k) {
        const std::int64_t choice = s * kChoices + k;
        double product = 0.0, magnitude = 0.0;
        for (std::int64_t j = 0; j < kColumns && kIndex[choice] < kRows; ++j) {
          const std::int64_t at = kIndex[choice] * kColumns + j;
          const double term = double{grad[s * kColumns + j]} * double{rows[at]};
          product += term;
          magnitude += std::abs(term);
          CHECK(same(drows[at], weights[choice] * grad[s * kColumns + j]));
        }
        CHECK(std::abs(dweights[choice] - product) <= kColumns * 0x1p-24 * magnitude);
      }
      for (std::int64_t j = 0; j < kColumns; ++j) {
        double sum = 0.0, ones = 0.0, magnitude = 0.0;
        for (std::int64_t k = 0; k < kChoices; ++k) {
          const std::int64_t row = kIndex[s * kChoices + k];
          if (row == kRows) continue;
          const double value = rows[row * kColumns + j], weight = weights[s * kChoices + k];
          sum += weight * value;
          ones += value;
          magnitude += std::abs(value) * std::max(1.0, std::abs(weight));
        }
        CHECK(std::abs(out[s * kColumns + j] - sum) <= 3 * 0x1p-24 * magnitude);
        CHECK(std::abs(plain[s * kColumns + j] - ones) <= 3 * 0x1p-24 * magnitude);
      }
    }
  });
}
