#include "ds/cpu_target.h"

#include <cstdlib>
#include <stdexcept>

#include "check.h"

using namespace ds;

TEST(the_best_or_the_one_named) {
  const char* named = std::getenv("DS_CPU_TARGET");
  if (named == nullptr) {
    CHECK(cpu_target() == available_cpu_targets().back());
  } else {
    CHECK(name(cpu_target()) == named);
  }
}

TEST(baseline_is_always_there) { CHECK(available_cpu_targets().front() == CpuTarget::kBaseline); }

TEST(an_unknown_name_is_refused_and_changes_nothing) {
  const CpuTarget before = cpu_target();
  CHECK_THROWS(std::invalid_argument, "'sse9' is no CPU target", (set_cpu_target("sse9"), 0));
  CHECK(cpu_target() == before);
}
