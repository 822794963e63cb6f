// Collectives between processes of one machine, without sockets.
//
// [Note: same-host collectives]
// The processes share one segment of memory: a memfd, so that nothing is left when all have ended, also after
// kill -9. Every rank owns a block of it, which only this rank writes: what its current call is, how far it
// has come, and two buffers. Small tensors are copied into the buffer of the call, and every other rank reads
// them there: one exchange of counters per call. Two buffers are enough, because a rank that posts call n + 1
// has finished reading those of call n. Large tensors stay where they are; the block has their address, and
// the other ranks read them with process_vm_readv: one copy, no packets. Waiting ranks spin for some
// microseconds and then sleep on a word of the other rank's block (futex); between sleeps they see whether
// its process has ended.
//
// Sums are computed in the order of a fixed binary tree over ranks, 16-bit floats in fp32: the result does
// not depend on timing, and all ranks get the same bits.
//
// Source: Vienne, Benefits of Cross Memory Attach for MPI libraries on HPC clusters (XSEDE 2014).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace ds::same_host {

inline constexpr int kMaxRanks = 64;

enum class Kind : std::uint32_t {
  kBarrier = 0,
  kAllReduce = 1,
  kReduceScatter = 2,
  kAllGather = 3,
  kBroadcast = 4,
  kAllToAll = 5,
};
enum class Element : std::uint32_t { kF32 = 0, kBF16 = 1, kF16 = 2, kF64 = 3, kI32 = 4, kI64 = 5, kByte = 6 };
enum class Op : std::uint32_t { kSum = 0, kMean = 1, kMax = 2, kMin = 3 };

std::size_t size_of(Element element);

// What the ranks of a call must agree on.
struct Call {
  Kind kind = Kind::kBarrier;
  Element element = Element::kByte;
  Op op = Op::kSum;
  std::uint32_t root = 0;
  std::uint64_t bytes = 0;  // of the tensor; 0 for calls in which ranks have different sizes

  bool operator==(const Call&) const = default;
};

enum class Fault : std::uint32_t {
  kNone = 0,
  kEnded = 1,        // the process of `rank` has ended
  kLeft = 2,         // `rank` has left the team, because of a failure of rank `code`; -1: of its own accord
  kDiffers = 3,      // `rank` makes another call, `theirs`
  kTimedOut = 4,     // `rank` has not come within the limit
  kSystem = 5,       // the system refuses to read the memory of `rank`: `code`
  kAborted = 6,      // this rank has left the team
  kInterrupted = 7,  // `interrupted` has returned true
};

struct Result {
  Fault fault = Fault::kNone;
  int rank = 0;
  int code = 0;
  Call theirs;
};

// A new segment for a team: a file descriptor; or -1, with errno.
int create_segment(int num_ranks);

// Reads `size` bytes of the memory of process `pid`. Returns 0 or an errno.
int read_memory(int pid, const void* from, void* to, std::size_t size);
// The same in the other direction: `from` is in this process, `to` in the other.
int write_memory(int pid, const void* from, void* to, std::size_t size);

// The ranks of one machine. All make the same calls in the same order. Calls of several threads are made one
// after the other.
class Team {
 public:
  // Maps the segment `fd`, which stays the caller's. `pids` has the process of every rank. Throws
  // std::system_error.
  Team(int fd, int rank, std::span<const int> pids, double limit_s);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int rank() const;
  int size() const;

  // Asked every 50 ms of a wait.
  using Interrupted = std::function<bool()>;

  Result barrier(const Interrupted& interrupted);
  // In place.
  Result all_reduce(void* data, std::int64_t numel, Element element, Op op, const Interrupted& interrupted);
  // `in` has the slices of all ranks, of `numel` elements each.
  Result reduce_scatter(void* out, const void* in, std::int64_t numel, Element element, Op op,
                        const Interrupted& interrupted);
  // `sizes` has the bytes of every rank's part; `out` is their concatenation. `in` may be this rank's part of
  // it.
  Result all_gather(void* out, const void* in, std::span<const std::uint64_t> sizes,
                    const Interrupted& interrupted);
  Result broadcast(void* data, std::size_t bytes, int root, const Interrupted& interrupted);
  // Part p of `in` goes to rank p; part p of `out` comes from it.
  Result all_to_all(void* out, std::span<const std::uint64_t> out_sizes, const void* in,
                    std::span<const std::uint64_t> in_sizes, const Interrupted& interrupted);

  // Ends the waits of this process and of all other ranks for it. All later calls fail.
  void leave();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ds::same_host
