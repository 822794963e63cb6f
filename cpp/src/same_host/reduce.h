// Reduction over ranks in a fixed order.
#pragma once

#include <cstdint>
#include <span>

#include "ds/same_host.h"

namespace ds::same_host {

// out[i] = the sum (or mean, maximum, minimum) over p of parts[p][i], in the order of a fixed binary tree
// over p. 16-bit floats are added in fp32 and rounded once. `out` may be one of the parts.
void reduce(std::span<const void* const> parts, std::int64_t numel, Element element, Op op, void* out);

}  // namespace ds::same_host
