#include "dispatch/chunks.h"

#include "check.h"

using namespace ds;

TEST(every_element_is_in_exactly_one_piece) {
  const std::vector<std::vector<std::int64_t>> lists{{},
                                                     {0},
                                                     {1},
                                                     {0, 0, 5, 0},
                                                     {1000},
                                                     {1, 2, 3, 64, 65, 500, 1},
                                                     {128, 128, 128},
                                                     {63, 1000, 1, 1, 1, 7777, 0}};
  for (const auto& numels : lists) {
    for (const std::int64_t chunk_numel : {64, 100, 128, 100'000}) {
      const ChunkPlan plan(numels, chunk_numel);
      std::vector<std::vector<int>> seen;
      for (const std::int64_t numel : numels) seen.emplace_back(static_cast<std::size_t>(numel), 0);
      for (std::int64_t chunk = 0; chunk < plan.num_chunks(); ++chunk) {
        plan.pieces(chunk, [&](std::size_t tensor, std::int64_t begin, std::int64_t numel) {
          CHECK(numel > 0);
          CHECK_EQ(begin % ChunkPlan::kCutNumel, 0);
          for (std::int64_t i = begin; i < begin + numel; ++i) ++seen[tensor][static_cast<std::size_t>(i)];
        });
      }
      for (const auto& counts : seen) {
        for (const int count : counts) CHECK_EQ(count, 1);
      }
    }
  }
}
