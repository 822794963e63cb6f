#include "ds/codes.h"

#include <cmath>

#include "check.h"

using namespace ds;
using namespace ds::check;

namespace {

// Blocks with gaps and odd lengths, behind each other.
std::vector<CodeBlock> blocks_of(std::int64_t count) {
  std::vector<CodeBlock> blocks;
  std::int64_t begin = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t numel = 1 + i * 37 % 500;
    blocks.push_back({begin, numel});
    begin += (numel + 7) / 8 * 8 + 8 * (i % 3);
  }
  return blocks;
}

std::size_t end_of(const std::vector<CodeBlock>& blocks) {
  return static_cast<std::size_t>(blocks.back().begin + blocks.back().numel);
}

}  // namespace

TEST(signs_of_blocks) {
  const std::vector<CodeBlock> blocks = blocks_of(40);
  const std::size_t n = end_of(blocks);
  const std::vector<float> x = random_floats(n, 1);
  for_each_target([&] {
    std::vector<float> residual(n, 0.25f), scales(blocks.size()), out(n, 9.0f);
    std::vector<std::uint8_t> bits((n + 7) / 8);
    sign_encode(blocks, {x.data(), DType::kF32, residual.data(), DType::kF32}, scales.data(), bits.data(), 2);
    sign_decode(blocks, scales.data(), bits.data(), {out.data(), DType::kF32, 1.0f, false}, 2);
    for (std::size_t b = 0; b < blocks.size(); ++b) {
      double sum = 0.0;
      for (std::int64_t i = 0; i < blocks[b].numel; ++i) {
        const auto at = static_cast<std::size_t>(blocks[b].begin + i);
        const float value = x[at] + 0.25f;
        sum += std::fabs(value);
        CHECK_EQ(std::signbit(out[at]), std::signbit(value));
        CHECK_EQ(std::fabs(out[at]), scales[b]);
        CHECK_EQ(residual[at], value - out[at]);
      }
      CHECK(std::fabs(scales[b] - sum / static_cast<double>(blocks[b].numel)) <= 1e-6 * scales[b]);
    }
  });
}

TEST(integers_of_blocks) {
  const std::vector<CodeBlock> blocks = blocks_of(40);
  const std::size_t n = end_of(blocks);
  const std::vector<float> x = random_floats(n, 2);
  for (const int bits : {4, 8}) {
    const float levels = bits == 4 ? 7.0f : 127.0f;
    for (const bool stochastic : {false, true}) {
      for_each_target([&] {
        std::vector<float> residual(n, 0.0f), scales(blocks.size()), out(n, 1.0f);
        std::vector<std::uint8_t> codes(n);
        int_encode(blocks, {x.data(), DType::kF32, residual.data(), DType::kF32}, bits, {stochastic, 7},
                   scales.data(), codes.data(), 2);
        int_decode(blocks, scales.data(), codes.data(), bits, {out.data(), DType::kF32, 2.0f, true}, 2);
        for (std::size_t b = 0; b < blocks.size(); ++b) {
          float largest = 0.0f;
          for (std::int64_t i = 0; i < blocks[b].numel; ++i) {
            const auto at = static_cast<std::size_t>(blocks[b].begin + i);
            largest = std::fmax(largest, std::fabs(x[at]));
            CHECK(std::fabs(residual[at]) <= scales[b] * (stochastic ? 1.001f : 0.501f));
            CHECK(std::fabs(out[at] - (1.0f + 2.0f * (x[at] - residual[at]))) <= 1e-5f * (1.0f + largest));
          }
          CHECK_EQ(scales[b], largest / levels);
        }
      });
    }
  }
}
