// One io_uring: the memory that it shares with the kernel, and the worker that drives it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "state.h"
#include "uring_abi.h"

namespace ds::io {

class Ring {
 public:
  // Throws SystemError with the name of the call that the system refused.
  explicit Ring(unsigned depth);
  // In a child of fork() the memory is not there, and must not be unmapped.
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // A cleared entry, which goes to the kernel with the next `enter`; never more than `depth` + 1 at once.
  uring::Sqe& next_entry();
  // Hands new entries over and, with `wait`, returns once there is a completion. -errno, or 0.
  int enter(bool wait);
  // The oldest completion; false if there is none.
  bool pop(uring::Cqe& completion);

  // Makes it possible to register `count` ranges of memory; 0 or -errno.
  int reserve_buffers(unsigned count);
  int set_buffer(unsigned index, void* data, std::size_t size);

 private:
  void map(const uring::Params& params);
  void check_operations();
  void unmap() noexcept;

  int fd_ = -1;
  void* rings_ = nullptr;
  std::size_t rings_size_ = 0;
  uring::Sqe* entries_ = nullptr;
  std::size_t entries_size_ = 0;
  std::uint32_t* sq_tail_ = nullptr;
  std::uint32_t* sq_head_ = nullptr;
  std::uint32_t* sq_array_ = nullptr;
  std::uint32_t sq_mask_ = 0;
  std::uint32_t* cq_head_ = nullptr;
  std::uint32_t* cq_tail_ = nullptr;
  uring::Cqe* completions_ = nullptr;
  std::uint32_t cq_mask_ = 0;
  std::uint32_t tail_ = 0;  // ours; the kernel sees it in `enter`
};

// An eventfd, by which other threads wake a worker that waits for its ring.
class Bell {
 public:
  Bell();  // throws SystemError
  ~Bell();
  Bell(const Bell&) = delete;
  Bell& operator=(const Bell&) = delete;
  void ring() const noexcept;
  void reset() const noexcept;
  int fd() const { return fd_; }

 private:
  int fd_;
};

class RingWorker {
 public:
  RingWorker(std::shared_ptr<State> state, unsigned depth);

  void run();  // until the engine ends
  void wake() const noexcept { bell_.ring(); }
  Ring& ring() { return ring_; }

 private:
  struct Slot {
    Request request;
    Bounce bounce;
    bool copied = false;
  };

  bool fill();
  void issue(std::size_t slot);
  void completed(std::size_t slot, ssize_t result);
  void arm_bell();

  std::shared_ptr<State> state_;
  Ring ring_;
  Bell bell_;
  std::vector<Slot> slots_;
  std::vector<std::size_t> free_;
  std::vector<std::size_t> reissue_;
  bool bell_armed_ = false;
};

}  // namespace ds::io
