// What the kernels of the CPU targets get for one panel of a grouped product: up to kPanel columns of C = A
// B.
#pragma once

#include <cstdint>

namespace ds {

inline constexpr std::int64_t kPanel = 64;

struct GroupedPanel {
  const void* a;  // (rows, depth), or (depth, rows) for gradients of weights; rows of a_row elements
  std::int64_t a_row;
  const void*
      b;  // the panel's part of B, (depth, columns) or, transposed, (columns, depth); rows of b_row elements
  std::int64_t b_row;
  const void* bias;  // (columns), or null
  void* c;           // (rows, columns), rows of c_row elements
  std::int64_t c_row;
  std::int64_t rows;
  std::int64_t columns;  // a multiple of 16
  std::int64_t depth;
  void* column_sums;  // (rows): sums of the columns of a (depth, rows), or null
};

// Floats of scratch memory that a panel needs.
constexpr std::int64_t grouped_scratch(std::int64_t depth) { return 2 * kPanel * depth; }

}  // namespace ds
