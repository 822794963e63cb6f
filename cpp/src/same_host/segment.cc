#include "same_host/segment.h"

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <climits>
#include <ctime>
#include <system_error>

namespace ds::same_host {
namespace {

using Clock = std::chrono::steady_clock;
constexpr long kSleepNs = 50'000'000;
constexpr int kSpins = 4000;  // some 100 us

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Other processes have the words, too, so none of these is FUTEX_PRIVATE.
void sleep_on(std::atomic<std::uint32_t>& word, std::uint32_t heard) {
  const timespec limit{0, kSleepNs};
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT, heard, &limit, nullptr, 0);
}

void wake_all(std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Spinning only helps if the rank that is waited for runs at the same time.
int spins(int num_ranks) {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) != 0) return 0;
  return CPU_COUNT(&cores) >= num_ranks ? kSpins : 0;
}

}  // namespace

int create_segment(int num_ranks) {
  const int fd = static_cast<int>(syscall(SYS_memfd_create, "ds_same_host", 1u /* MFD_CLOEXEC */));
  if (fd < 0) return -1;
  if (ftruncate(fd, static_cast<off_t>(sizeof(Block)) * num_ranks) != 0) {
    const int code = errno;
    close(fd);
    errno = code;
    return -1;
  }
  return fd;
}

namespace {

// Copies between this process and another one, with one of the two system calls.
template <typename Transfer>
int transfer(Transfer call, int pid, std::byte* own, std::byte* theirs, std::size_t size) {
  while (size > 0) {
    const iovec local{own, size};
    const iovec remote{theirs, size};
    const ssize_t count = call(pid, &local, 1, &remote, 1, 0);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno;
    if (count == 0) return EFAULT;
    own += count;
    theirs += count;
    size -= static_cast<std::size_t>(count);
  }
  return 0;
}

std::byte* bytes_of(const void* pointer) { return static_cast<std::byte*>(const_cast<void*>(pointer)); }

}  // namespace

int read_memory(int pid, const void* from, void* to, std::size_t size) {
  return transfer(process_vm_readv, pid, bytes_of(to), bytes_of(from), size);
}

int write_memory(int pid, const void* from, void* to, std::size_t size) {
  return transfer(process_vm_writev, pid, bytes_of(from), bytes_of(to), size);
}

Segment::Segment(int fd, int rank, std::span<const int> pids, double limit_s)
    : rank_(rank),
      limit_s_(limit_s),
      num_spins_(spins(static_cast<int>(pids.size()))),
      pids_(pids.begin(), pids.end()) {
  bytes_ = sizeof(Block) * pids_.size();
  void* mapped = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  blocks_ = static_cast<Block*>(mapped);
  for (const int pid : pids_) {
    const int alive = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
    if (alive < 0) {
      const int code = errno;
      for (const int other : alive_) close(other);
      munmap(blocks_, bytes_);
      throw std::system_error(code, std::generic_category(), "pidfd_open");
    }
    alive_.push_back(alive);
  }
}

Segment::~Segment() {
  for (const int alive : alive_) close(alive);
  munmap(blocks_, bytes_);
}

// A waiting rank increments `num_waiting`, and then the kernel compares the bell with what the rank has
// heard; here the bell is changed before `num_waiting` is read. So one of the two sees the change of the
// other.
void Segment::ring() {
  own().bell.fetch_add(1, std::memory_order_seq_cst);
  if (own().num_waiting.load(std::memory_order_seq_cst) != 0) wake_all(own().bell);
}

void Segment::publish(std::uint64_t progress) {
  own().progress.store(progress, std::memory_order_release);
  ring();
}

void Segment::leave(int culprit) {
  std::uint32_t before = 0;  // the first reason stays
  own().left.compare_exchange_strong(before, static_cast<std::uint32_t>(culprit + 2),
                                     std::memory_order_acq_rel);
  ring();
  // Threads of this process sleep on the bells of other ranks.
  for (int rank = 0; rank < size(); ++rank) wake_all(block(rank).bell);
}

Result Segment::why_left(int rank) const {
  const std::uint32_t left = block(rank).left.load(std::memory_order_acquire);
  if (left == 0) return {};
  return {Fault::kLeft, rank, static_cast<int>(left) - 2, {}};
}

bool Segment::has_ended(int rank) const {
  pollfd poll_for{alive_[static_cast<std::size_t>(rank)], POLLIN, 0};
  return poll(&poll_for, 1, 0) > 0;
}

Result Segment::wait_for(int rank, std::uint64_t progress, const Team::Interrupted& interrupted) const {
  Block& other = block(rank);
  const auto has_come = [&] { return other.progress.load(std::memory_order_acquire) >= progress; };
  for (int spin = 0; spin <= num_spins_; ++spin) {
    if (has_come()) return {};
    relax();
  }
  const Clock::time_point begun = Clock::now();
  for (;;) {
    const std::uint32_t heard = other.bell.load(std::memory_order_acquire);
    // Looked at before `has_come`: what a rank did before it left or ended counts.
    const Result left = why_left(rank);
    const bool ended = left.fault == Fault::kNone && has_ended(rank);
    if (has_come()) return {};
    if (has_left()) return {Fault::kAborted, rank, 0, {}};
    if (left.fault != Fault::kNone) return left;
    if (ended) return {Fault::kEnded, rank, 0, {}};
    if (std::chrono::duration<double>(Clock::now() - begun).count() > limit_s_) {
      return {Fault::kTimedOut, rank, 0, {}};
    }
    other.num_waiting.fetch_add(1, std::memory_order_seq_cst);
    if (!has_come()) sleep_on(other.bell, heard);
    other.num_waiting.fetch_sub(1, std::memory_order_seq_cst);
    if (interrupted && interrupted()) return {Fault::kInterrupted, rank, 0, {}};
  }
}

}  // namespace ds::same_host
