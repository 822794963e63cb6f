#include "ds/same_host.h"

#include <unistd.h>

#include <bit>
#include <limits>
#include <thread>

#include "check.h"
#include "same_host/reduce.h"

using namespace ds;
using namespace ds::check;
using same_host::Element;
using same_host::Op;

namespace {

float in_tree_order(std::span<const float> values) {
  if (values.size() == 1) return values[0];
  const std::size_t middle = std::bit_floor(values.size() - 1);
  return in_tree_order(values.first(middle)) + in_tree_order(values.subspan(middle));
}

// Two teams in two threads of this process, which read "each other's" memory.
struct Pair {
  Pair() {
    const int pids[] = {getpid(), getpid()};
    const int fd = same_host::create_segment(2);
    for (int rank = 0; rank < 2; ++rank)
      teams.push_back(std::make_unique<same_host::Team>(fd, rank, pids, 20.0));
    close(fd);
  }
  std::vector<std::unique_ptr<same_host::Team>> teams;
};

}  // namespace

TEST(adds_in_the_order_of_a_tree_also_into_one_of_the_parts) {
  constexpr std::size_t kNumel = 5000;
  for (const std::size_t count : {1u, 2u, 3u, 4u, 5u, 7u, 8u}) {
    for (std::size_t target = 0; target < count; ++target) {
      std::vector<std::vector<float>> parts;
      for (std::size_t p = 0; p < count; ++p) parts.push_back(random_floats(kNumel, p + 1));
      std::vector<float> expected;
      for (std::size_t i = 0; i < kNumel; ++i) {
        std::vector<float> column;
        for (const auto& part : parts) column.push_back(part[i]);
        expected.push_back(in_tree_order(column));
      }
      std::vector<const void*> pointers;
      for (const auto& part : parts) pointers.push_back(part.data());
      same_host::reduce(pointers, kNumel, Element::kF32, Op::kSum, parts[target].data());
      for (std::size_t i = 0; i < kNumel; ++i) CHECK_EQ(parts[target][i], expected[i]);
    }
  }
}

TEST(integers_wrap_around_and_nan_wins) {
  const std::int32_t large = std::numeric_limits<std::int32_t>::max(), one = 1;
  std::int32_t sum = 0;
  const void* integers[] = {&large, &one};
  same_host::reduce(integers, 1, Element::kI32, Op::kSum, &sum);
  CHECK_EQ(sum, std::numeric_limits<std::int32_t>::min());
  same_host::reduce(integers, 1, Element::kI32, Op::kMin, &sum);
  CHECK_EQ(sum, 1);

  const double nan = std::numeric_limits<double>::quiet_NaN(), two = 2.0;
  for (const Op op : {Op::kMax, Op::kMin}) {
    double result = 0.0;
    const void* first[] = {&nan, &two};
    same_host::reduce(first, 1, Element::kF64, op, &result);
    CHECK(result != result);
    const void* second[] = {&two, &nan};
    same_host::reduce(second, 1, Element::kF64, op, &result);
    CHECK(result != result);
  }
}

TEST(two_threads_reduce_small_and_large_tensors) {
  Pair pair;
  for (const std::int64_t numel : {1, 16'384, 16'385, 300'001}) {
    std::vector<std::vector<float>> data;
    for (std::uint64_t rank = 0; rank < 2; ++rank) {
      data.push_back(random_floats(static_cast<std::size_t>(numel), rank + 1));
    }
    const std::vector<std::vector<float>> inputs = data;
    const auto run = [&](std::size_t rank) {
      const same_host::Result result =
          pair.teams[rank]->all_reduce(data[rank].data(), numel, Element::kF32, Op::kSum, {});
      CHECK(result.fault == same_host::Fault::kNone);
    };
    std::thread other([&] { run(1); });
    run(0);
    other.join();
    for (std::size_t i = 0; i < data[0].size(); ++i) {
      CHECK_EQ(data[0][i], inputs[0][i] + inputs[1][i]);
      CHECK_EQ(data[1][i], data[0][i]);
    }
  }
}

TEST(a_rank_that_leaves_ends_the_wait_for_it) {
  Pair pair;
  std::thread other([&] { pair.teams[1]->leave(); });
  const same_host::Result result = pair.teams[0]->barrier({});
  other.join();
  CHECK(result.fault == same_host::Fault::kLeft);
  CHECK_EQ(result.rank, 1);
  CHECK(pair.teams[0]->barrier({}).fault == same_host::Fault::kLeft);  // it stays broken
}
