// Which variant of the CPU kernels runs on this machine.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace ds {

enum class CpuTarget { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

std::string_view name(CpuTarget target);

// All targets that this binary holds and this CPU can run, worst first.
std::vector<CpuTarget> available_cpu_targets();

// The target in use. The first call picks the best available one, or the one that the environment variable
// DS_CPU_TARGET names. Throws std::invalid_argument when that name is unknown or this CPU cannot run it.
CpuTarget cpu_target();

// Replaces the choice, for tests. Empty: choose again as the first call does. Throws like cpu_target().
void set_cpu_target(std::string_view name);

}  // namespace ds
