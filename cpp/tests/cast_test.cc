#include "ds/cast.h"

#include <bit>
#include <cmath>
#include <limits>

#include "check.h"

using namespace ds;
using namespace ds::check;

namespace {

template <class Half>
std::vector<Half> all_patterns() {
  std::vector<Half> x(1u << 16);
  for (std::size_t i = 0; i < x.size(); ++i) x[i].bits = static_cast<std::uint16_t>(i);
  return x;
}

template <class Src, class Dst>
void convert(const std::vector<Src>& src, DType src_dtype, std::vector<Dst>& dst, DType dst_dtype) {
  const CastTensor t{src.data(), dst.data(), static_cast<std::int64_t>(src.size()), src_dtype, dst_dtype};
  cast({&t, 1}, 2);
}

// Numbers at, just below and just above each value and each midpoint of neighbours, so that every rounding
// decision of the format is taken.
template <class Half>
void check_rounding(DType dtype) {
  const std::vector<Half> values = all_patterns<Half>();
  std::vector<float> src;
  std::vector<std::uint16_t> expected;
  for (std::uint32_t bits = 0; bits + 1 < (1u << 15); ++bits) {
    const double low = widen(values[bits]);
    const double high = widen(values[bits + 1]);
    if (!std::isfinite(low) || !std::isfinite(high)) continue;
    const auto middle = static_cast<float>((low + high) / 2);
    const auto even = static_cast<std::uint16_t>(bits % 2 == 0 ? bits : bits + 1);
    for (const std::uint16_t sign : {0, 0x8000}) {
      const float factor = sign != 0 ? -1.0f : 1.0f;
      src.push_back(factor * middle);
      expected.push_back(even | sign);
      if (middle <= 0x1p-140f)
        continue;  // the neighbours of the smallest fp32 numbers are the values themselves
      src.push_back(factor * std::nextafter(middle, 0.0f));
      expected.push_back(static_cast<std::uint16_t>(bits | sign));
      src.push_back(factor * std::nextafter(middle, HUGE_VALF));
      expected.push_back(static_cast<std::uint16_t>((bits + 1) | sign));
    }
  }
  for_each_target([&] {
    std::vector<Half> dst(src.size());
    convert(src, DType::kF32, dst, dtype);
    for (std::size_t i = 0; i < src.size(); ++i) CHECK_EQ(dst[i].bits, expected[i]);
  });
}

template <class Half>
void check_widening(DType dtype) {
  const std::vector<Half> src = all_patterns<Half>();
  for_each_target([&] {
    std::vector<float> dst(src.size());
    convert(src, dtype, dst, DType::kF32);
    for (std::size_t i = 0; i < src.size(); ++i) CHECK(same(dst[i], widen(src[i])));
  });
}

}  // namespace

TEST(bf16_rounds_to_nearest_even) { check_rounding<BF16>(DType::kBF16); }
TEST(f16_rounds_to_nearest_even) { check_rounding<F16>(DType::kF16); }
TEST(bf16_widens_exactly) { check_widening<BF16>(DType::kBF16); }
TEST(f16_widens_exactly) { check_widening<F16>(DType::kF16); }

TEST(limits_and_nan) {
  const float inf = std::numeric_limits<float>::infinity();
  // The last is a NaN whose payload lies only in bits that rounding would drop or carry away.
  const std::vector<float> src{inf,      -inf,    NAN,   65519.0f,
                               65520.0f, 3.4e38f, -0.0f, std::bit_cast<float>(0x7f800001u)};
  for_each_target([&] {
    std::vector<BF16> b(src.size());
    std::vector<F16> h(src.size());
    convert(src, DType::kF32, b, DType::kBF16);
    convert(src, DType::kF32, h, DType::kF16);
    CHECK_EQ(b[0].bits, 0x7f80);
    CHECK_EQ(b[1].bits, 0xff80);
    CHECK(std::isnan(widen(b[2])) && std::isnan(widen(h[2])));
    CHECK_EQ(h[3].bits, 0x7bff);
    CHECK_EQ(h[4].bits, 0x7c00);
    CHECK_EQ(b[5].bits, 0x7f80);
    CHECK_EQ(b[6].bits, 0x8000);
    CHECK(std::isnan(widen(b[7])) && std::isnan(widen(h[7])));
  });
}
