// The kernels of src/cuda/codes-inl.h, emulated, against those of the CPU: the same bits.
#include "check.h"
#include "ds/codes.h"
#include "ds/norm.h"
#include "emulated_gpu.h"

namespace ds {
namespace {
constexpr int kThreads = 256;
#include "cuda/simd_gpu.h"
// Sums.
#include "cuda/fixed_sums.h"
// The kernels.
#include "cuda/codes-inl.h"

using namespace check;

// Gaps, odd lengths, the largest block, blocks of zeros and of one element; more than one block of threads.
const std::vector<CodeBlock> kBlocks = {{0, 4096},  {4096, 17},  {4128, 8},  {4136, 1},   {4144, 1000},
                                        {5200, 31}, {5232, 256}, {5488, 33}, {5528, 2048}};
constexpr std::size_t kNumel = 7600;
const DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};

struct Buffer {
  std::vector<float> f32;
  std::vector<BF16> bf16;
  std::vector<F16> f16;
  DType dtype;

  Buffer(const std::vector<float>& values, DType as) : dtype(as) {
    for (const float value : values) {
      f32.push_back(value);
      narrow(&bf16.emplace_back(), value);
      narrow(&f16.emplace_back(), value);
    }
  }
  void* data() {
    if (dtype == DType::kF32) return f32.data();
    if (dtype == DType::kBF16) return bf16.data();
    return f16.data();
  }
  float at(std::size_t i) const {
    if (dtype == DType::kF32) return f32[i];
    if (dtype == DType::kBF16) return ds::widen(bf16[i]);
    return ds::widen(f16[i]);
  }
};

std::vector<float> values_with_zeros(std::uint64_t seed) {
  std::vector<float> values = random_floats(kNumel, seed);
  for (std::size_t i = 5232; i < 5488; ++i) values[i] = 0.0f;
  values[3] = -0.0f;
  return values;
}

void check_same(const Buffer& a, const Buffer& b) {
  for (std::size_t i = 0; i < kNumel; ++i) CHECK(same(a.at(i), b.at(i)));
}

unsigned grid() { return static_cast<unsigned>((kBlocks.size() * kWarp + kThreads - 1) / kThreads); }

struct Encoded {
  std::vector<float> scales = std::vector<float>(kBlocks.size(), 9.0f);
  std::vector<std::uint8_t> codes = std::vector<std::uint8_t>(kNumel, 0xAB);
};

// Encodes and decodes by both; encode and decode get (whether emulated, arguments).
template <class Encode, class Decode>
void compare(DType dtype, const DType* kept, const std::vector<float>& values, Encode encode, Decode decode) {
  Buffer x(values, dtype);
  const std::vector<float> errors = random_floats(kNumel, 5, 1.0f);
  Buffer residuals[2] = {Buffer(errors, kept ? *kept : DType::kF32),
                         Buffer(errors, kept ? *kept : DType::kF32)};
  Encoded encoded[2];
  for (const int emulated : {0, 1}) {
    const CodeSource source{x.data(), dtype, kept ? residuals[emulated].data() : nullptr, residuals[0].dtype};
    encode(emulated == 1, source, encoded[emulated]);
  }
  for (std::size_t b = 0; b < kBlocks.size(); ++b) CHECK(same(encoded[0].scales[b], encoded[1].scales[b]));
  CHECK(encoded[0].codes == encoded[1].codes);
  check_same(residuals[0], residuals[1]);
  for (const DType out : kDTypes) {
    for (const bool add : {false, true}) {
      Buffer outs[2] = {Buffer(errors, out), Buffer(errors, out)};
      for (const int emulated : {0, 1}) {
        decode(emulated == 1, encoded[0], CodeTarget{outs[emulated].data(), out, 1.0f / 3.0f, add});
      }
      check_same(outs[0], outs[1]);
    }
  }
}

void compare_signs(DType dtype, const DType* kept, const std::vector<float>& values) {
  const auto count = static_cast<std::int64_t>(kBlocks.size());
  compare(
      dtype, kept, values,
      [&](bool emulated, const CodeSource& source, Encoded& to) {
        if (!emulated) return sign_encode(kBlocks, source, to.scales.data(), to.codes.data(), 2);
        emulated::launch(grid(), kThreads, [&] {
          sign_encode_kernel(kBlocks.data(), count, source, to.scales.data(), to.codes.data());
        });
      },
      [&](bool emulated, const Encoded& from, const CodeTarget& to) {
        if (!emulated) return sign_decode(kBlocks, from.scales.data(), from.codes.data(), to, 2);
        emulated::launch(grid(), kThreads, [&] {
          sign_decode_kernel(kBlocks.data(), count, from.scales.data(), from.codes.data(), to);
        });
      });
}

template <int kBits>
void compare_ints(DType dtype, const DType* kept, const std::vector<float>& values,
                  const Rounding& rounding) {
  const auto count = static_cast<std::int64_t>(kBlocks.size());
  compare(
      dtype, kept, values,
      [&](bool emulated, const CodeSource& source, Encoded& to) {
        if (!emulated) {
          return int_encode(kBlocks, source, kBits, rounding, to.scales.data(), to.codes.data(), 2);
        }
        emulated::launch(grid(), kThreads, [&] {
          int_encode_kernel<kBits>(kBlocks.data(), count, source, rounding, to.scales.data(),
                                   to.codes.data());
        });
      },
      [&](bool emulated, const Encoded& from, const CodeTarget& to) {
        if (!emulated) return int_decode(kBlocks, from.scales.data(), from.codes.data(), kBits, to, 2);
        emulated::launch(grid(), kThreads, [&] {
          int_decode_kernel<kBits>(kBlocks.data(), count, from.scales.data(), from.codes.data(), to);
        });
      });
}

// Calls body with every dtype of x and of the residual, also without one.
template <class Body>
void for_each_dtype(Body body) {
  const DType bf16 = DType::kBF16, f32 = DType::kF32;
  for (const DType dtype : kDTypes) {
    for (const DType* kept : {static_cast<const DType*>(nullptr), &f32, &bf16}) body(dtype, kept);
  }
}

TEST(signs) {
  for_each_dtype([](DType dtype, const DType* kept) { compare_signs(dtype, kept, values_with_zeros(1)); });
}

TEST(integers) {
  for_each_dtype([](DType dtype, const DType* kept) {
    const Rounding rounding{kept != nullptr, (std::uint64_t{1} << 63) + 12345};
    compare_ints<4>(dtype, kept, values_with_zeros(2), rounding);
    compare_ints<8>(dtype, kept, values_with_zeros(3), rounding);
  });
}

TEST(values_that_are_not_finite) {
  std::vector<float> values = values_with_zeros(4);
  values[100] = INFINITY;
  values[4130] = NAN;
  values[4136] = 1e-42f;  // below the smallest normal number, in a block of its own
  const DType kept = DType::kF32;
  compare_signs(DType::kF32, &kept, values);
  compare_ints<4>(DType::kF32, &kept, values, {false, 0});
  compare_ints<8>(DType::kF32, &kept, values, {true, 7});
}

}  // namespace
}  // namespace ds
