// Formats of parameters and optimizer states other than fp32: what an update reads and writes for one tensor.
//
// [Note: update in tiles] An update with such formats works on tiles of 512 elements: what is not fp32 is
// widened into a buffer in the L1 cache, the ordinary kernel updates the buffer, and the new values are
// narrowed. Memory is read and written once, in the narrow formats; the formulas are those of fp32.
//
// [Note: split masters] A bf16 parameter and 16 more bits are an fp32 master in 4 bytes:
//   bits(master) = (bits(param) << 16) + sign_extend(low)       low in [-2^15, 2^15)
//   bits(param)  = (bits(master) + 2^15) >> 16,  low = the lower 16 bits of bits(master)
// So param is master rounded to nearest, ties away from zero. Round to nearest even would need 2^16 + 1
// values of low for an even param. A NaN is stored as the quiet NaN of its sign, because rounding could carry
// it to -0.
//
// [Note: stochastic rounding] fp32 is rounded to one of its two bf16 neighbours, to the farther one with a
// probability proportional to the distance: the lower 16 bits are added to 16 random bits, and the carry
// decides. Infinity and NaN stay. The random bits are a hash of the value itself and of a key, which is new
// in each step and for each state. So an element is rounded alike wherever it is in a tensor, and however the
// tensor is divided among threads and ranks; a counter of elements would have to be the same on all of them.
//   x = (bits + key) * 0x9e3779b1;  x ^= x >> 15;  x *= 0x85ebca77;  random = x >> 16     (modulo 2^32)
//
// [Note: 8-bit moments] Adam's m and v, one byte each, in blocks of 32 elements from the tensor's start. Each
// byte is a logarithm, linear within an octave, as in a floating-point number. With V the block's largest v:
//   v:  5 bits of exponent, 3 of mantissa: from 2^-31 of V's octave on
//   m:  sign, 4 bits of exponent, 3 of mantissa: 16 octaves, the highest one that of 8 * 2^floor(log2(V) / 2).
//       |m| < 7.3 * sqrt(v) for beta1 = 0.9, beta2 = 0.999 (Cauchy-Schwarz), so that m needs no scale of its own.
// The biased exponent of V, rounded up to a code (8 bits), is stored in the lowest bits of the first 8 bytes
// of m, which therefore have 2 bits of mantissa. m's code 0 (of either sign) is 0; an exponent of 0 means
// that the block is all zeros. Both are rounded stochastically: with round to nearest, v would not move,
// because it changes by 1 - beta2 in a step, and its codes differ by 1/8. m below the range becomes 0. v
// below the range becomes the smallest code, so that no denominator vanishes; V below 2^-95 counts as 2^-95.
// A block with infinity or NaN becomes NaN.
//   random = ((bits(m) ^ key) + bits(v)) * 0x9e3779b1;  for v its upper 20 bits, for m bits 11 to 30 (or 31)
// The last block of a tensor may be shorter. Fewer than 8 elements have no room for the exponent: each of
// them has 1 bit of mantissa and an exponent of its own, m from 2^-56 to 2^8, v from 2^-112 to 2^16. Any
// tensor that is cut at a multiple of 32 elements has the same blocks as before.
#pragma once

#include <cstdint>

#include "ds/dtype.h"

namespace ds {

inline constexpr std::int64_t kMomentBlock = 32;

struct TensorFormat {
  DType param_dtype = DType::kF32;  // of UpdateTensor::param
  std::int16_t* low = nullptr;      // of a bf16 parameter, [Note: split masters]; or null
  bool stochastic = false;          // bf16 states: [Note: stochastic rounding]; else to nearest even
  bool away = false;  // a bf16 copy of an fp32 parameter rounds ties away from zero, as split masters do

  bool plain() const { return param_dtype == DType::kF32 && !stochastic && !away; }
};

// What the random bits of one step are made from: a key for each state, the first one for 8-bit moments.
struct RoundingKeys {
  std::uint32_t state[2] = {0, 0};
};

}  // namespace ds
