#include "ds/signs.h"

#include <cmath>

#include "check.h"

using namespace ds;
using namespace ds::check;

TEST(packs_and_unpacks_every_length) {
  for (const std::size_t n : {0u, 1u, 7u, 8u, 9u, 15u, 16u, 17u, 31u, 1000u, 70'001u}) {
    std::vector<float> x = random_floats(n, n + 1);
    if (n > 3) x[3] = -0.0f;
    for_each_target([&] {
      std::vector<std::uint8_t> bits((n + 7) / 8 + 1, 0xab);
      double expected = 0.0;
      for (const float value : x) expected += std::fabs(value);
      const double sum = pack_signs(x.data(), DType::kF32, static_cast<std::int64_t>(n), bits.data(), 2);
      CHECK(std::fabs(sum - expected) <= 1e-12 * (1.0 + expected));
      CHECK_EQ(bits.back(), 0xab);  // nothing behind the end
      for (std::size_t i = 0; i < n; ++i) CHECK_EQ(bits[i / 8] >> (i % 8) & 1, std::signbit(x[i]) ? 1 : 0);
      if (n % 8 != 0) CHECK_EQ(bits[n / 8] >> (n % 8), 0);

      std::vector<float> y(n + 1, 9.0f);
      unpack_signs(bits.data(), 0.5f, y.data(), DType::kF32, static_cast<std::int64_t>(n), 2);
      for (std::size_t i = 0; i < n; ++i) CHECK_EQ(y[i], std::signbit(x[i]) ? -0.5f : 0.5f);
      CHECK_EQ(y[n], 9.0f);
    });
  }
}
