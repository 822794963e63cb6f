#include "ds/formats.h"

#include "check.h"
#include "ds/adam.h"

using namespace ds;
using namespace ds::check;

namespace {

// Adam over a tensor that is cut at `cuts`: uint8 moments, or bf16 ones, or split masters.
struct Job {
  std::vector<float> grad;
  std::vector<float> param;
  std::vector<std::uint8_t> codes[2];
  std::vector<BF16> high;
  std::vector<std::int16_t> low;
  std::vector<float> moments[2];

  explicit Job(std::size_t n) : grad(random_floats(n, 1)), param(random_floats(n, 2)), high(n), low(n) {
    for (int i = 0; i < 2; ++i) {
      codes[i].resize(n);
      moments[i].resize(n);
    }
    high = to_bf16(param);
  }

  void step(std::int64_t number, const std::vector<std::size_t>& cuts, bool split, int threads) {
    std::vector<UpdateTensor> tensors;
    std::vector<TensorFormat> formats;
    for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
      const std::size_t at = cuts[i];
      const auto numel = static_cast<std::int64_t>(cuts[i + 1] - at);
      UpdateTensor t{param.data() + at,
                     {codes[0].data() + at, codes[1].data() + at},
                     grad.data() + at,
                     nullptr,
                     numel,
                     DType::kU8,
                     DType::kF32,
                     DType::kF32};
      TensorFormat format;
      if (split) {
        t.param = reinterpret_cast<float*>(high.data() + at);
        for (int k = 0; k < 2; ++k) t.states[k] = moments[k].data() + at;
        t.state_dtype = DType::kF32;
        format.param_dtype = DType::kBF16;
        format.low = low.data() + at;
      }
      tensors.push_back(t);
      formats.push_back(format);
    }
    const RoundingKeys keys{{static_cast<std::uint32_t>(number) * 0x9e3779b1u, 7}};
    adam_step({.step = number, .lr = 0.1}, tensors, threads, {}, formats, keys);
  }
};

}  // namespace

TEST(cuts_threads_and_targets_do_not_change_8_bit_moments) {
  const std::size_t n = 40'005;
  Job first(n);
  bool is_first = true;
  for_each_target([&] {
    for (const std::vector<std::size_t>& cuts :
         {std::vector<std::size_t>{0, n}, std::vector<std::size_t>{0, 32, 4128, 40'000, n}}) {
      for (const int threads : {1, 3}) {
        Job job(n);
        for (std::int64_t number = 1; number < 5; ++number) job.step(number, cuts, false, threads);
        if (is_first) first = job;
        is_first = false;
        CHECK(job.param == first.param);
        CHECK(job.codes[0] == first.codes[0]);
        CHECK(job.codes[1] == first.codes[1]);
      }
    }
  });
  CHECK(first.codes[1] != std::vector<std::uint8_t>(n));
}

TEST(split_masters_are_fp32_masters) {
  const std::size_t n = 4099;
  for_each_target([&] {
    Job job(n);
    std::vector<float> whole(n), m(n), v(n);
    for (std::size_t i = 0; i < n; ++i) whole[i] = widen(job.high[i]);
    for (std::int64_t number = 1; number < 6; ++number) {
      job.step(number, {0, n}, true, 2);
      const UpdateTensor t{whole.data(),
                           {m.data(), v.data()},
                           job.grad.data(),
                           nullptr,
                           static_cast<std::int64_t>(n),
                           {},
                           {},
                           {}};
      adam_step({.step = number, .lr = 0.1}, {&t, 1}, 2);
    }
    for (std::size_t i = 0; i < n; ++i) {
      const std::uint32_t bits = (std::uint32_t{job.high[i].bits} << 16) +
                                 static_cast<std::uint32_t>(static_cast<std::int32_t>(job.low[i]));
      CHECK(same(__builtin_bit_cast(float, bits), whole[i]));
    }
    CHECK(job.moments[0] == m);
    CHECK(job.moments[1] == v);
  });
}
