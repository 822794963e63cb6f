// The allocator of optimizer states and I/O buffers: memory on huge pages.
//
// Memory comes from the system in slabs aligned to 2 MiB and advised to huge pages. With 4 KiB pages the
// fused optimizers spend a sixth of their time on address translation, and direct I/O splits a request at
// every page.
#pragma once

#include <cstddef>

namespace ds {

struct ArenaStats {
  std::size_t reserved_bytes;  // address space taken from the system
  std::size_t in_use_bytes;    // of blocks given out, rounded up to kArenaAlignment
  std::size_t num_blocks;
  bool huge_pages;  // the kernel accepted the advice for every slab
};

inline constexpr std::size_t kArenaAlignment = 64;
// Blocks of 64 KiB and more begin at pages, so that direct I/O needs no copy of them.
inline constexpr std::size_t kArenaPage = 4096;
inline constexpr std::size_t kArenaPageBlock = std::size_t{64} << 10;

// A block of at least `size` bytes, aligned to kArenaAlignment or kArenaPage; its contents are undefined.
// Throws std::bad_alloc.
void* arena_allocate(std::size_t size);

// Gives back a block of arena_allocate. A slab without blocks goes back to the system.
void arena_free(void* block) noexcept;

ArenaStats arena_stats();

}  // namespace ds
