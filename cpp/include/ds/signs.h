// One bit per element: signs packed into bytes, with the scale that makes +-scale the best approximation.
//
// Bit i % 8 of byte i / 8 is the sign bit of element i: 1 for negative numbers and -0. Unused bits are 0. The
// mean of |x| minimises the squared error of +-scale (Bernstein et al. 2018, section 2; 1-bit SGD, Seide et
// al. 2014).
#pragma once

#include <cstdint>

#include "ds/dtype.h"

namespace ds {

// Returns the fp64 sum of |x| in the fixed order of ds/norm.h. `bits` has (numel + 7) / 8 bytes.
double pack_signs(const void* x, DType dtype, std::int64_t numel, std::uint8_t* bits, int num_threads);

// out[i] = -scale where bit i is set, else scale; rounded to the nearest even value of dtype.
void unpack_signs(const std::uint8_t* bits, float scale, void* out, DType dtype, std::int64_t numel,
                  int num_threads);

}  // namespace ds
