// Tensors encoded in 1, 4 or 8 bits an element, in blocks with a scale each, with error feedback in the same
// pass. Formulas, for block B with n elements and v = x + residual (both widened to fp32):
//
//   signs     scale = fp32(sum |v| / n), summed in fp64 in the order of [Note: sums in fixed order];
//             code 1 for a sign bit that is set; decoded: -scale or scale
//   integers  scale = max |v| / L with L = 2^(bits - 1) - 1, 0 if that is not a normal number;
//             code = round(v * (1 / scale)), to nearest even, or of v * (1 / scale) + u - 1/2 with u uniform in
//             [0, 1); kept within [-L, L]; decoded: code * scale
//   residual  v - decoded, rounded to the residual's dtype
//
// A block with a value that is not finite: signs have a scale that is not finite, integers the scale NaN.
#pragma once

#include <cstdint>
#include <span>

#include "ds/dtype.h"

namespace ds {

inline constexpr std::int64_t kMaxCodeBlock = 4096;

// Elements [begin, begin + numel) of a tensor. begin is a multiple of 8, and blocks do not overlap when their
// ends are rounded up to multiples of 8, so that no two blocks share a byte of codes.
struct CodeBlock {
  std::int64_t begin;
  std::int64_t numel;
};

// What is encoded: x, or x + residual.
struct CodeSource {
  const void* x;
  DType dtype;
  void* residual;  // or null
  DType residual_dtype;
};

// What is decoded: out = weight * value, or out += weight * value.
struct CodeTarget {
  void* out;
  DType dtype;
  float weight;
  bool add;
};

// How integers are rounded.
struct Rounding {
  bool stochastic;
  std::uint64_t seed;
};

// scales has an element per block; codes one bit per element of the tensor, lowest bit first.
void sign_encode(std::span<const CodeBlock> blocks, const CodeSource& source, float* scales,
                 std::uint8_t* codes, int num_threads);
void sign_decode(std::span<const CodeBlock> blocks, const float* scales, const std::uint8_t* codes,
                 const CodeTarget& target, int num_threads);

// bits is 4 (two codes a byte, the first in the low half, stored with 8 added) or 8.
void int_encode(std::span<const CodeBlock> blocks, const CodeSource& source, int bits,
                const Rounding& rounding, float* scales, std::uint8_t* codes, int num_threads);
void int_decode(std::span<const CodeBlock> blocks, const float* scales, const std::uint8_t* codes, int bits,
                const CodeTarget& target, int num_threads);

}  // namespace ds
