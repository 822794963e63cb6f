#include "ds/arena.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

namespace ds {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kSlab = 16 * kHugePage;

// [Note: cache colouring] If several arrays begin at multiples of 2 MiB of physical memory and a loop reads
// them in parallel, the elements with the same index are in the same cache sets and memory banks. So slabs
// for large blocks begin at different 4 KiB pages (colours) after a multiple of 2 MiB. This keeps the
// alignment for direct I/O; the first and last pages of a slab are then small ones.
constexpr std::size_t kColour = 4096;
constexpr std::size_t kNumColours = 16;

constexpr std::size_t round_up(std::size_t size, std::size_t unit) { return (size + unit - 1) / unit * unit; }

// Address space that begins `colour` bytes after a multiple of a huge page, or throws.
std::uintptr_t map_slab(std::size_t size, std::size_t colour, bool& advised) {
  void* raw = mmap(nullptr, size + 2 * kHugePage, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const auto begin = reinterpret_cast<std::uintptr_t>(raw);
  const std::uintptr_t first = round_up(begin, kHugePage) + colour;
  if (first != begin) munmap(raw, first - begin);
  munmap(reinterpret_cast<void*>(first + size), begin + 2 * kHugePage - first);
  advised = madvise(reinterpret_cast<void*>(first), size, MADV_HUGEPAGE) == 0 && advised;
  return first;
}

class Arena {
 public:
  void* allocate(std::size_t size) {
    size = round_up(std::max<std::size_t>(size, 1), kArenaAlignment);
    std::lock_guard lock(mutex_);
    std::uintptr_t block = take(size);
    if (block == 0) {
      add_slab(size);
      block = take(size);
    }
    blocks_.emplace(block, size);
    in_use_bytes_ += size;
    return reinterpret_cast<void*>(block);
  }

  void release(void* pointer) {
    std::lock_guard lock(mutex_);
    const auto found = blocks_.find(reinterpret_cast<std::uintptr_t>(pointer));
    if (found == blocks_.end()) return;
    const auto [block, size] = *found;
    blocks_.erase(found);
    in_use_bytes_ -= size;
    give_back(block, size);
  }

  ArenaStats stats() {
    std::lock_guard lock(mutex_);
    return {reserved_bytes_, in_use_bytes_, blocks_.size(), advised_};
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // From the first free range that is large enough; 0 when there is none.
  std::uintptr_t take(std::size_t size) {
    const std::size_t alignment = size >= kArenaPageBlock ? kArenaPage : kArenaAlignment;
    for (auto range = free_.begin(); range != free_.end(); ++range) {
      const auto [begin, length] = *range;
      const std::uintptr_t block = round_up(begin, alignment);
      if (block + size > begin + length) continue;
      free_.erase(range);
      if (block > begin) free_.emplace(begin, block - begin);
      if (begin + length > block + size) free_.emplace(block + size, begin + length - block - size);
      return block;
    }
    return 0;
  }

  void add_slab(std::size_t size) {
    const std::size_t length = round_up(std::max(size, kSlab), kHugePage);
    const std::size_t colour = length > kSlab ? next_colour_++ % kNumColours * kColour : 0;
    const std::uintptr_t begin = map_slab(length, colour, advised_);
    slabs_.emplace(begin, length);
    free_.emplace(begin, length);
    reserved_bytes_ += length;
  }

  void give_back(std::uintptr_t begin, std::size_t length) {
    const auto slab = std::prev(slabs_.upper_bound(begin));
    // Neighbouring free ranges grow together, but never across slabs: each is unmapped on its own.
    auto after = free_.lower_bound(begin);
    if (after != free_.end() && after->first == begin + length && after->first < slab->first + slab->second) {
      length += after->second;
      after = free_.erase(after);
    }
    if (after != free_.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second == begin && before->first >= slab->first) {
        begin = before->first;
        length += before->second;
        free_.erase(before);
      }
    }
    if (begin == slab->first && length == slab->second) {
      munmap(reinterpret_cast<void*>(begin), length);
      reserved_bytes_ -= length;
      slabs_.erase(slab);
      return;
    }
    free_.emplace(begin, length);
  }

  std::mutex mutex_;
  std::map<std::uintptr_t, std::size_t> slabs_;  // begin -> bytes
  std::map<std::uintptr_t, std::size_t> free_;   // begin -> bytes
  std::unordered_map<std::uintptr_t, std::size_t> blocks_;
  std::size_t next_colour_ = 0;
  std::size_t reserved_bytes_ = 0;
  std::size_t in_use_bytes_ = 0;
  bool advised_ = true;
};

// Never destroyed: tensors may outlive every static object.
Arena& arena() {
  static Arena* const instance = [] {
    static Arena* created = new Arena;
    // A child of fork() must not inherit the lock from a thread that it does not have.
    pthread_atfork([] { created->lock(); }, [] { created->unlock(); }, [] { created->unlock(); });
    return created;
  }();
  return *instance;
}

}  // namespace

void* arena_allocate(std::size_t size) { return arena().allocate(size); }
void arena_free(void* block) noexcept { arena().release(block); }
ArenaStats arena_stats() { return arena().stats(); }

}  // namespace ds
