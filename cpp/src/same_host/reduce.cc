#include "same_host/reduce.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>

#include "ds/cast.h"

namespace ds::same_host {
namespace {

constexpr std::int64_t kBlock =
    2048;  // elements: the intermediate sums of a block stay in the first-level cache

// NaN wins, as in torch.
template <typename T>
T larger(T a, T b) {
  return a > b || a != a ? a : b;
}
template <typename T>
T smaller(T a, T b) {
  return a < b || a != a ? a : b;
}

template <typename T>
void combine(T* into, const T* a, const T* b, std::int64_t n, Op op) {
  switch (op) {
    case Op::kSum:
    case Op::kMean:
      for (std::int64_t i = 0; i < n; ++i) into[i] = a[i] + b[i];
      break;
    case Op::kMax:
      for (std::int64_t i = 0; i < n; ++i) into[i] = larger(a[i], b[i]);
      break;
    case Op::kMin:
      for (std::int64_t i = 0; i < n; ++i) into[i] = smaller(a[i], b[i]);
      break;
  }
}

template <typename T>
struct Plain {
  using Sum = T;
  static const T* load(const void* part, std::int64_t begin, std::int64_t, T*) {
    return static_cast<const T*>(part) + begin;
  }
  static void store(const T* values, void* out, std::int64_t begin, std::int64_t n) {
    std::memcpy(static_cast<T*>(out) + begin, values, static_cast<std::size_t>(n) * sizeof(T));
  }
};

template <DType dtype>
struct Narrow {
  using Sum = float;
  static const float* load(const void* part, std::int64_t begin, std::int64_t n, float* scratch) {
    const CastTensor wide{static_cast<const std::uint16_t*>(part) + begin, scratch, n, dtype, DType::kF32};
    cast({&wide, 1}, 1);
    return scratch;
  }
  static void store(const float* values, void* out, std::int64_t begin, std::int64_t n) {
    const CastTensor narrow{values, static_cast<std::uint16_t*>(out) + begin, n, DType::kF32, dtype};
    cast({&narrow, 1}, 1);
  }
};

// The values of a block of one subtree: in `scratch`, or in the only part itself.
template <typename Format>
const typename Format::Sum* subtree(std::span<const void* const> parts, std::int64_t begin, std::int64_t n,
                                    Op op, typename Format::Sum* scratch) {
  using Sum = typename Format::Sum;
  if (parts.size() == 1) return Format::load(parts[0], begin, n, scratch);
  const std::size_t middle = std::bit_floor(parts.size() - 1);  // the largest power of two below the count
  std::array<Sum, kBlock> second;
  const Sum* a = subtree<Format>(parts.first(middle), begin, n, op, scratch);
  const Sum* b = subtree<Format>(parts.subspan(middle), begin, n, op, second.data());
  combine(scratch, a, b, n, op);
  return scratch;
}

template <typename Format>
void reduce_as(std::span<const void* const> parts, std::int64_t numel, Op op, void* out) {
  using Sum = typename Format::Sum;
  std::array<Sum, kBlock> scratch;
  for (std::int64_t begin = 0; begin < numel; begin += kBlock) {
    const std::int64_t n = std::min(kBlock, numel - begin);
    const Sum* values = subtree<Format>(parts, begin, n, op, scratch.data());
    if (op == Op::kMean) {
      if constexpr (std::is_floating_point_v<Sum>) {
        const Sum scale = Sum(1.0 / static_cast<double>(parts.size()));
        for (std::int64_t i = 0; i < n; ++i) scratch[static_cast<std::size_t>(i)] = values[i] * scale;
        values = scratch.data();
      }
    }
    Format::store(values, out, begin, n);
  }
}

}  // namespace

std::size_t size_of(Element element) {
  switch (element) {
    case Element::kF32:
    case Element::kI32:
      return 4;
    case Element::kBF16:
    case Element::kF16:
      return 2;
    case Element::kF64:
    case Element::kI64:
      return 8;
    case Element::kByte:
      return 1;
  }
  return 1;
}

void reduce(std::span<const void* const> parts, std::int64_t numel, Element element, Op op, void* out) {
  switch (element) {
    case Element::kF32:
      return reduce_as<Plain<float>>(parts, numel, op, out);
    case Element::kF64:
      return reduce_as<Plain<double>>(parts, numel, op, out);
    case Element::kBF16:
      return reduce_as<Narrow<DType::kBF16>>(parts, numel, op, out);
    case Element::kF16:
      return reduce_as<Narrow<DType::kF16>>(parts, numel, op, out);
    case Element::kI32:  // sums wrap around, which signed integers may not
      return op == Op::kSum ? reduce_as<Plain<std::uint32_t>>(parts, numel, op, out)
                            : reduce_as<Plain<std::int32_t>>(parts, numel, op, out);
    case Element::kI64:
      return op == Op::kSum ? reduce_as<Plain<std::uint64_t>>(parts, numel, op, out)
                            : reduce_as<Plain<std::int64_t>>(parts, numel, op, out);
    case Element::kByte:
      return;
  }
}

}  // namespace ds::same_host
