// Element types of the kernels, and the number formats that C++ has no type for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ds {

// kU8: optimizer states in the codes of ds/formats.h.
enum class DType : std::uint8_t { kF32 = 0, kBF16 = 1, kF16 = 2, kU8 = 3 };
inline constexpr int kNumDTypes = 3;  // of floats

// Storage only: arithmetic is done in fp32.
struct BF16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

constexpr std::size_t size_of(DType dtype) { return dtype == DType::kF32 ? 4 : dtype == DType::kU8 ? 1 : 2; }

}  // namespace ds
