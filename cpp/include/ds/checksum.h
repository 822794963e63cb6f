// Checksums of blocks of a tensor, from which a changed bit is found.
//
// [Note: checksum of a block] A block is kChecksumBlock elements, counted from the tensor's start; the last
// one may be shorter. Its bytes are read as little-endian words of 32 bits, w_0, w_1, ..., the last one
// filled up with zeros. The checksum is
//   sum of w_i * a_i  modulo 2^64,   a_i = (2 i + 1) * 0x9e3779b1  modulo 2^32
// The a_i are odd and different from each other. A product of two numbers below 2^32 is below 2^64, therefore
// these changes are found without exception: any change of one word (|d| * a_i is less than 2^64 and not 0),
// and words i and j that were exchanged ((a_i - a_j) * (w_i - w_j), likewise), and two flipped bits. Other
// changes stay unnoticed with a probability of about 2^-64. Additions modulo 2^64 may be done in any order,
// so the number depends on neither threads nor vectors.
#pragma once

#include <cstdint>
#include <span>

#include "ds/dtype.h"
#include "ds/formats.h"
#include "ds/update.h"

namespace ds {

inline constexpr std::int64_t kChecksumBlock = 4096;
inline constexpr std::uint32_t kChecksumFactor = 0x9e3779b1u;

constexpr std::int64_t num_checksums(std::int64_t numel) {
  return (numel + kChecksumBlock - 1) / kChecksumBlock;
}

struct ChecksumTensor {
  const void* data;
  std::int64_t numel;
  DType dtype;
  std::uint64_t* sums;  // receives num_checksums(numel) numbers
};

void checksums(std::span<const ChecksumTensor> tensors, int num_threads);

// Where an update adds the checksums of what it reads and of what it writes, for one tensor: rows of
// num_checksums(numel) numbers, zero before the call. Rows: gradient, parameter, states, master bits if there
// are any. The row of the gradient in `written` stays as it is.
struct UpdateSums {
  std::uint64_t* read;
  std::uint64_t* written;
};
inline int num_sum_rows(const UpdateTensor& t, const TensorFormat& format) {
  return 2 + (t.states[0] != nullptr ? 1 : 0) + (t.states[1] != nullptr ? 1 : 0) +
         (format.low != nullptr ? 1 : 0);
}

}  // namespace ds
