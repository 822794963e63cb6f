#include "check.h"

#include <bit>
#include <cmath>
#include <cstring>

namespace ds::check {
namespace {

struct Test {
  const char* name;
  TestFn fn;
};

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

int g_failures = 0;

}  // namespace

bool add_test(const char* name, TestFn fn) {
  tests().push_back({name, fn});
  return true;
}

void fail(const char* file, int line, const std::string& what) {
  ++g_failures;
  if (g_failures <= 20)
    std::fprintf(stderr, "%s:%d [%s]: %s\n", file, line, name(cpu_target()).data(), what.c_str());
}

std::vector<float> random_floats(std::size_t count, std::uint64_t seed, float largest) {
  std::vector<float> x(count);
  std::uint64_t state = seed * 2862933555777941757u + 3037000493u;
  for (float& value : x) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const auto mantissa = static_cast<float>(static_cast<std::int64_t>(state) >> 40) * 0x1p-23f;  // [-1, 1)
    const int exponent = static_cast<int>(state >> 8 & 15u);
    value = std::ldexp(mantissa * largest, -exponent);
  }
  return x;
}

float widen(BF16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

float widen(F16 x) {
  const int exponent = x.bits >> 10 & 31;
  const int fraction = x.bits & 1023;
  double magnitude;
  if (exponent == 31) {
    magnitude = fraction == 0 ? HUGE_VAL : std::nan("");
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, -24);
  } else {
    magnitude = std::ldexp(1024 + fraction, exponent - 25);
  }
  return static_cast<float>((x.bits & 0x8000u) != 0 ? -magnitude : magnitude);
}

std::vector<BF16> to_bf16(const std::vector<float>& x) {
  std::vector<BF16> y;
  for (const float value : x)
    y.push_back({static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16)});
  return y;
}

bool same(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

}  // namespace ds::check

int main() {
  for (const auto& test : ds::check::tests()) test.fn();
  if (ds::check::g_failures != 0) {
    std::fprintf(stderr, "%d checks failed\n", ds::check::g_failures);
    return 1;
  }
  std::printf("%zu tests passed\n", ds::check::tests().size());
  return 0;
}
