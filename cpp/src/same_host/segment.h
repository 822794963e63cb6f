// The shared segment of a team: its layout, and waiting for other ranks.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "ds/same_host.h"

namespace ds::same_host {

inline constexpr std::size_t kInlineBytes = 64
                                            << 10;  // tensors up to this size are copied through the segment

// What a rank says about its current call. There are two, used in turn, as the buffers are.
struct Post {
  std::uint64_t number = 0;
  Call call;
  std::uint64_t source = 0;  // address of its input, in its own memory
  std::uint64_t parts[kMaxRanks] =
      {};  // kAllToAll: bytes of the part for every rank; kAllGather: bytes in [0]
};

// Only its owner writes it, except `num_waiting`. Words that ranks wait for have a cache line of their own.
struct Block {
  alignas(64) std::atomic<std::uint64_t> progress;  // kSteps * number of the call + step
  alignas(64) std::atomic<std::uint32_t> bell;  // incremented with every change; waiting ranks sleep on it
  alignas(64) std::atomic<std::uint32_t> num_waiting;
  std::atomic<std::uint32_t>
      left;  // 0: it has not; 1: of its own accord; 2 + r: because of a failure of rank r
  alignas(64) Post posts[2];
  alignas(4096) std::byte buffers[2][kInlineBytes];
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

// Steps of a call.
inline constexpr std::uint64_t kSteps = 3;
inline constexpr std::uint64_t kPosted = 1;  // the input may be read
inline constexpr std::uint64_t kRead = 2;    // this rank is done with the memory of all others

class Segment {
 public:
  Segment(int fd, int rank, std::span<const int> pids, double limit_s);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(pids_.size()); }
  int pid(int rank) const { return pids_[static_cast<std::size_t>(rank)]; }
  Block& block(int rank) const { return blocks_[rank]; }
  Block& own() const { return blocks_[rank_]; }

  // Tells the other ranks how far this one has come.
  void publish(std::uint64_t progress);
  // Waits until `rank` has come so far.
  Result wait_for(int rank, std::uint64_t progress, const Team::Interrupted& interrupted) const;
  // Ends waits of this process, and those of other ranks for it. `culprit`: the rank that failed; -1: none.
  void leave(int culprit);
  // The failure that another rank has had if it has left.
  Result why_left(int rank) const;
  bool has_left() const { return own().left.load(std::memory_order_acquire) != 0; }

 private:
  bool has_ended(int rank) const;
  void ring();

  int rank_;
  double limit_s_;
  int num_spins_;
  std::vector<int> pids_;
  std::vector<int> alive_;  // pidfds, readable when the process has ended
  std::size_t bytes_ = 0;
  Block* blocks_ = nullptr;
};

}  // namespace ds::same_host
