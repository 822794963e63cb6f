// A test harness of one page: TEST(name) { CHECK(...); } in as many files as one likes, main() in check.cc.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "ds/cpu_target.h"
#include "ds/dtype.h"

namespace ds::check {

using TestFn = void (*)();
bool add_test(const char* name, TestFn fn);
void fail(const char* file, int line, const std::string& what);

// Calls the body once per CPU target that this machine has, with that target chosen.
template <class Body>
void for_each_target(Body body) {
  for (const CpuTarget target : available_cpu_targets()) {
    set_cpu_target(name(target));
    body();
  }
  set_cpu_target("");
}

// Reproducible numbers of many magnitudes and both signs.
std::vector<float> random_floats(std::size_t count, std::uint64_t seed, float largest = 4.0f);

// Independent of the kernels: through double arithmetic and a search for the nearest value.
float widen(BF16 x);
float widen(F16 x);
std::vector<BF16> to_bf16(const std::vector<float>& x);  // truncates: any bf16 numbers will do as input

// Bit patterns equal, NaNs of any payload equal.
bool same(float a, float b);

}  // namespace ds::check

#define TEST(name)                                                          \
  static void test_##name();                                                \
  static const bool added_##name = ds::check::add_test(#name, test_##name); \
  static void test_##name()

#define CHECK(condition)                                               \
  do {                                                                 \
    if (!(condition)) ds::check::fail(__FILE__, __LINE__, #condition); \
  } while (false)

#define CHECK_EQ(actual, expected)                                                                  \
  do {                                                                                              \
    const auto check_actual = (actual);                                                             \
    const auto check_expected = (expected);                                                         \
    if (!(check_actual == check_expected)) {                                                        \
      ds::check::fail(__FILE__, __LINE__,                                                           \
                      std::string(#actual " == " #expected ", but they are ") +                     \
                          std::to_string(check_actual) + " and " + std::to_string(check_expected)); \
    }                                                                                               \
  } while (false)

#define CHECK_THROWS(Exception, fragment, expression)                                                  \
  do {                                                                                                 \
    bool check_thrown = false;                                                                         \
    try {                                                                                              \
      (void)(expression);                                                                              \
    } catch (const Exception& error) {                                                                 \
      check_thrown = std::string(error.what()).find(fragment) != std::string::npos;                    \
      if (!check_thrown) ds::check::fail(__FILE__, __LINE__, std::string("message: ") + error.what()); \
    }                                                                                                  \
    if (!check_thrown) ds::check::fail(__FILE__, __LINE__, #expression " throws " #Exception);         \
  } while (false)
