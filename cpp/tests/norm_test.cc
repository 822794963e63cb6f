#include "ds/norm.h"

#include <cmath>

#include "check.h"

using namespace ds;
using namespace ds::check;

namespace {

NormTensor tensor(const std::vector<float>& x, std::size_t begin = 0) {
  return {x.data() + begin, static_cast<std::int64_t>(x.size() - begin), DType::kF32};
}

// [Note: sums in fixed order], written out.
double oracle_block(const float* x, std::int64_t n) {
  double lane[16] = {};
  for (std::int64_t i = 0; i < n; ++i) lane[i % 16] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

}  // namespace

TEST(sums_blocks_in_the_fixed_order) {
  const std::vector<float> x = random_floats(2 * kNormBlock + 4321, 9);
  double expected = 0.0;
  for (std::size_t begin = 0; begin < x.size(); begin += kNormBlock) {
    expected += oracle_block(x.data() + begin, std::min<std::int64_t>(kNormBlock, x.size() - begin));
  }
  for_each_target([&] {
    for (const int threads : {1, 2, 5}) {
      const NormTensor t = tensor(x);
      const SquaredNorm norm = squared_norm({&t, 1}, threads);
      CHECK_EQ(norm.sum, expected);
      CHECK(norm.finite);
    }
  });
}

TEST(block_sums_do_not_depend_on_where_a_block_lies) {
  const std::vector<float> x = random_floats(1000, 10);
  for_each_target([&] {
    for (const std::int64_t block : {1, 7, 16, 100, 1000, 5000}) {
      std::vector<double> sums(static_cast<std::size_t>((1000 + block - 1) / block), -1.0);
      squared_norm_blocks(tensor(x), block, sums.data(), 2);
      for (std::size_t i = 0; i < sums.size(); ++i) {
        const auto begin = static_cast<std::int64_t>(i) * block;
        CHECK_EQ(sums[i], oracle_block(x.data() + begin, std::min(block, 1000 - begin)));
      }
    }
  });
}

TEST(notices_what_is_not_finite) {
  for (const float bad : {INFINITY, -INFINITY, NAN}) {
    for (const std::size_t place : {0u, 5u, 16u, 999u}) {
      std::vector<float> x = random_floats(1000, 11);
      x[place] = bad;
      for_each_target([&] {
        const NormTensor t = tensor(x);
        CHECK(!squared_norm({&t, 1}, 1).finite);
      });
    }
  }
  const std::vector<float> huge(1000, 3e38f);  // finite, although fp32 squares would not be
  const NormTensor t = tensor(huge);
  CHECK(squared_norm({&t, 1}, 1).finite);
}
