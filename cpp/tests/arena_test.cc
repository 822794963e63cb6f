#include "ds/arena.h"

#include <cstring>

#include "check.h"

using namespace ds;

namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

}  // namespace

TEST(blocks_are_aligned_and_do_not_overlap) {
  std::vector<unsigned char*> blocks;
  std::vector<std::size_t> sizes{1, 63, 64, 65, 4096, kMiB, 3 * kMiB + 5, 40 * kMiB};
  for (const std::size_t size : sizes) {
    blocks.push_back(static_cast<unsigned char*>(arena_allocate(size)));
    CHECK_EQ(reinterpret_cast<std::uintptr_t>(blocks.back()) % kArenaAlignment, 0u);
    std::memset(blocks.back(), static_cast<int>(blocks.size()), size);
  }
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    CHECK_EQ(blocks[i][0], i + 1);
    CHECK_EQ(blocks[i][sizes[i] - 1], i + 1);
  }
  CHECK_EQ(arena_stats().num_blocks, blocks.size());
  for (unsigned char* block : blocks) arena_free(block);
}

TEST(blocks_for_io_begin_at_pages) {
  std::vector<void*> blocks;
  for (const std::size_t size :
       {std::size_t{64}, kArenaPageBlock, std::size_t{100}, kArenaPageBlock + 1, kMiB}) {
    blocks.push_back(arena_allocate(size));
    if (size >= kArenaPageBlock) CHECK_EQ(reinterpret_cast<std::uintptr_t>(blocks.back()) % kArenaPage, 0u);
  }
  void* const small = arena_allocate(128);  // before the first of the large ones
  CHECK(small < blocks[1]);
  arena_free(small);
  for (void* block : blocks) arena_free(block);
  CHECK_EQ(arena_stats().reserved_bytes, 0u);
}

TEST(large_blocks_begin_at_different_pages) {
  std::vector<void*> blocks;
  std::vector<std::uintptr_t> colours;
  for (int i = 0; i < 4; ++i) {
    blocks.push_back(arena_allocate(64 * kMiB));
    const auto address = reinterpret_cast<std::uintptr_t>(blocks.back());
    CHECK_EQ(address % 4096, 0u);
    for (const std::uintptr_t other : colours) CHECK(address % (2 * kMiB) != other);
    colours.push_back(address % (2 * kMiB));
    std::memset(blocks.back(), 1, 64 * kMiB);
  }
  for (void* block : blocks) arena_free(block);
  CHECK_EQ(arena_stats().reserved_bytes, 0u);
}

TEST(everything_goes_back) {
  std::vector<void*> blocks;
  for (int i = 0; i < 200; ++i) blocks.push_back(arena_allocate(static_cast<std::size_t>(i) * 10'000 + 1));
  CHECK(arena_stats().reserved_bytes >= arena_stats().in_use_bytes);
  CHECK(arena_stats().in_use_bytes >= 199 * 200 / 2 * 10'000);
  for (std::size_t i = 0; i < blocks.size(); i += 2) arena_free(blocks[i]);  // holes first
  for (std::size_t i = 1; i < blocks.size(); i += 2) arena_free(blocks[i]);
  CHECK_EQ(arena_stats().num_blocks, 0u);
  CHECK_EQ(arena_stats().in_use_bytes, 0u);
  CHECK_EQ(arena_stats().reserved_bytes, 0u);
}

TEST(a_freed_block_is_used_again) {
  void* keep = arena_allocate(64);
  void* first = arena_allocate(5 * kMiB);
  const std::size_t reserved = arena_stats().reserved_bytes;
  arena_free(first);
  void* second = arena_allocate(5 * kMiB);
  CHECK(second == first);
  CHECK_EQ(arena_stats().reserved_bytes, reserved);
  arena_free(second);
  arena_free(keep);
}
