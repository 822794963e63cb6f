#include "ds/cpu_target.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "dispatch/kernel_table.h"

namespace ds {
namespace {

struct Variant {
  CpuTarget target;
  std::string_view name;
  const KernelTable* table;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

constexpr Variant kVariants[] = {
    {CpuTarget::kBaseline, "baseline", &baseline::kKernels, +[] { return true; }},
#if defined(__x86_64__)
    {CpuTarget::kAvx2, "avx2", &avx2::kKernels, has_avx2},
    {CpuTarget::kAvx512, "avx512", &avx512::kKernels, has_avx512},
#endif
};

std::string available_names() {
  std::string names;
  for (const Variant& v : kVariants) {
    if (v.supported()) names += (names.empty() ? "" : ", ") + std::string(v.name);
  }
  return names;
}

const Variant& find(std::string_view wanted, std::string_view source) {
  for (const Variant& v : kVariants) {
    if (v.name != wanted) continue;
    if (v.supported()) return v;
    throw std::invalid_argument(std::string(source) + "='" + std::string(wanted) +
                                "': this CPU cannot run that target; it can run " + available_names());
  }
  throw std::invalid_argument(std::string(source) + "='" + std::string(wanted) +
                              "' is no CPU target; this CPU can run " + available_names());
}

const Variant& choose() {
  if (const char* wanted = std::getenv("DS_CPU_TARGET"); wanted != nullptr && *wanted != '\0') {
    return find(wanted, "DS_CPU_TARGET");
  }
  const Variant* best = &kVariants[0];
  for (const Variant& v : kVariants) {
    if (v.supported()) best = &v;
  }
  return *best;
}

std::atomic<const Variant*> g_variant{nullptr};

const Variant& current() {
  const Variant* v = g_variant.load(std::memory_order_acquire);
  if (v == nullptr) {
    v = &choose();
    g_variant.store(v, std::memory_order_release);
  }
  return *v;
}

}  // namespace

std::string_view name(CpuTarget target) {
  for (const Variant& v : kVariants) {
    if (v.target == target) return v.name;
  }
  return "unknown";
}

std::vector<CpuTarget> available_cpu_targets() {
  std::vector<CpuTarget> targets;
  for (const Variant& v : kVariants) {
    if (v.supported()) targets.push_back(v.target);
  }
  return targets;
}

CpuTarget cpu_target() { return current().target; }

void set_cpu_target(std::string_view wanted) {
  g_variant.store(wanted.empty() ? &choose() : &find(wanted, "cpu target"), std::memory_order_release);
}

const KernelTable& kernels() { return *current().table; }

}  // namespace ds
