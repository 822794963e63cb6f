#include "ds/checksum.h"

#include <cstring>

#include "check.h"
#include "ds/adam.h"
#include "ds/sgd.h"

using namespace ds;
using namespace ds::check;

namespace {

// [Note: checksum of a block], written out.
std::uint64_t oracle(const void* data, std::size_t bytes) {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; 4 * i < bytes; ++i) {
    std::uint32_t word = 0;
    std::memcpy(&word, static_cast<const char*>(data) + 4 * i, std::min<std::size_t>(4, bytes - 4 * i));
    const auto weight = static_cast<std::uint32_t>(2 * i + 1) * kChecksumFactor;
    sum += static_cast<std::uint64_t>(word) * weight;
  }
  return sum;
}

template <class T>
std::vector<std::uint64_t> oracles(const std::vector<T>& x) {
  std::vector<std::uint64_t> sums;
  for (std::size_t begin = 0; begin < x.size(); begin += kChecksumBlock) {
    const std::size_t numel = std::min<std::size_t>(kChecksumBlock, x.size() - begin);
    sums.push_back(oracle(x.data() + begin, numel * sizeof(T)));
  }
  return sums;
}

std::vector<std::uint64_t> joined(std::initializer_list<std::vector<std::uint64_t>> rows) {
  std::vector<std::uint64_t> all;
  for (const auto& row : rows) all.insert(all.end(), row.begin(), row.end());
  return all;
}

const std::size_t kNumel = 5 * kChecksumBlock * 8 + 77;  // several chunks, which share blocks

}  // namespace

TEST(every_target_computes_the_formula) {
  for (const std::size_t numel : {1u, 15u, 16u, 17u, 4095u, 4096u, 4097u, 100'003u}) {
    const std::vector<float> x = random_floats(numel, numel);
    const std::vector<BF16> h = to_bf16(x);
    for_each_target([&] {
      for (const int threads : {1, 3}) {
        std::vector<std::uint64_t> of_x(oracles(x).size()), of_h(of_x.size());
        const auto n = static_cast<std::int64_t>(numel);
        const ChecksumTensor tensors[] = {{x.data(), n, DType::kF32, of_x.data()},
                                          {h.data(), n, DType::kBF16, of_h.data()}};
        checksums(tensors, threads);
        CHECK(of_x == oracles(x));
        CHECK(of_h == oracles(h));
      }
    });
  }
}

TEST(a_flipped_bit_and_two_exchanged_words_change_it) {
  std::vector<std::uint32_t> x(64);
  for (std::uint32_t i = 0; i < 64; ++i) x[i] = i % 3 == 0 ? 0 : ~i;
  const std::uint64_t before = oracle(x.data(), 256);
  for (std::size_t i = 0; i < 64; ++i) {
    for (int bit = 0; bit < 32; ++bit) {
      x[i] ^= 1u << bit;
      CHECK(oracle(x.data(), 256) != before);
      x[i] ^= 1u << bit;
    }
    for (std::size_t j = 0; j < i; ++j) {
      if (x[i] == x[j]) continue;
      std::swap(x[i], x[j]);
      CHECK(oracle(x.data(), 256) != before);
      std::swap(x[i], x[j]);
    }
  }
}

TEST(adam_sums_what_it_reads_and_writes_and_keeps_its_bits) {
  const std::vector<float> p0 = random_floats(kNumel, 1), m0 = random_floats(kNumel, 2), v0(kNumel, 0.5f),
                           g = random_floats(kNumel, 3);
  const std::vector<BF16> half = to_bf16(g);
  const std::size_t blocks = oracles(p0).size();
  const AdamOptions options{.step = 3};
  for_each_target([&] {
    for (const int threads : {1, 4}) {
      std::vector<float> p[2] = {p0, p0}, m[2] = {m0, m0}, v[2] = {v0, v0};
      std::vector<std::uint64_t> read(4 * blocks), written(4 * blocks);
      const UpdateSums sums{read.data(), written.data()};
      for (const int with : {0, 1}) {
        const UpdateTensor t{p[with].data(),
                             {m[with].data(), v[with].data()},
                             half.data(),
                             nullptr,
                             static_cast<std::int64_t>(kNumel),
                             DType::kF32,
                             DType::kBF16,
                             DType::kF32};
        if (with != 0) {
          adam_step(options, {&t, 1}, threads, {&sums, 1});
        } else {
          adam_step(options, {&t, 1}, threads);
        }
      }
      CHECK(p[0] == p[1] && m[0] == m[1] && v[0] == v[1]);
      CHECK(read == joined({oracles(half), oracles(p0), oracles(m0), oracles(v0)}));
      const std::vector<std::uint64_t> none(blocks);
      CHECK(written == joined({none, oracles(p[0]), oracles(m[0]), oracles(v[0])}));
    }
  });
}

TEST(a_step_without_states_has_two_rows) {
  const std::vector<float> p0 = random_floats(kNumel, 1), g = random_floats(kNumel, 3);
  std::vector<float> p = p0;
  const std::size_t blocks = oracles(p0).size();
  std::vector<std::uint64_t> read(2 * blocks), written(2 * blocks);
  const UpdateSums sums{read.data(), written.data()};
  const UpdateTensor t{
      p.data(), {nullptr, nullptr}, g.data(), nullptr, static_cast<std::int64_t>(kNumel), {}, {}, {}};
  sgd_step({.lr = 0.1}, {&t, 1}, 2, {&sums, 1});
  CHECK(read == joined({oracles(g), oracles(p0)}));
  CHECK(written == joined({std::vector<std::uint64_t>(blocks), oracles(p)}));
}
