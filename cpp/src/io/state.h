// What an engine and its workers share: operations, cut into requests, and what became of them.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <vector>

#include "ds/io.h"
#include "file.h"

namespace ds::io {

using Clock = std::chrono::steady_clock;

class Operation {
 public:
  Operation(Kind kind_in, std::shared_ptr<File> file_in, char* data_in, std::size_t size_in,
            std::int64_t offset_in)
      : kind(kind_in), file(std::move(file_in)), data(data_in), size(size_in), offset(offset_in) {}

  const Kind kind;
  const std::shared_ptr<File> file;
  char* const data;
  const std::size_t size;
  const std::int64_t offset;

  std::atomic<bool> done{false};
  std::atomic<bool> seen{false};  // somebody has asked how it ended
  std::atomic<std::int64_t> bytes_done{0};

  // Guarded by State::mutex.
  std::size_t cut = 0;           // bytes that were cut into requests so far
  unsigned num_outstanding = 0;  // requests that were handed to workers and have not come back
  std::optional<Failure> failure;
};

// One system call, if all goes well. Owned by one worker.
struct Request {
  std::shared_ptr<Operation> operation;
  char* data = nullptr;
  std::int64_t offset = 0;
  std::size_t size = 0;
  bool direct = false;
  int buffer_index = -1;     // of registered memory that holds all of it
  unsigned num_retries = 0;  // in a row
  Clock::time_point retry_since;
};

enum class Next { kReissue, kFinished };

// A range of registered memory.
struct Registered {
  int index;
  std::size_t size;
  bool continues;  // the next range belongs to the same call
};

struct State {
  explicit State(const Options& options_in) : options(options_in) {}

  const Options options;
  pid_t process = 0;
  Backend backend = Backend::kThreads;
  std::atomic<std::uint64_t> progress{0};

  mutable std::mutex mutex;
  std::condition_variable available;             // for workers of the threads backend
  std::condition_variable finished;              // an operation is done, or a worker has ended
  std::deque<std::shared_ptr<Operation>> queue;  // not yet wholly cut into requests
  std::vector<std::shared_ptr<Operation>> failed;
  std::map<const File*, std::size_t> pending;  // operations that are not done, by file
  std::size_t num_pending = 0;
  std::map<std::uintptr_t, Registered> registered;  // by address
  std::size_t num_workers = 0;
  bool stopping = false;

  // The next request of the oldest operation; false if there is none.
  bool take(Request& request);
  // Likewise, but waits for one; false when the workers should end.
  bool wait_and_take(Request& request);
  bool should_end() const;
  // What the result of the system call (bytes or -errno) means for the request.
  Next settle(Request& request, ssize_t result);
  void worker_ends();
  // With the lock held.
  void cancel_queue();

 private:
  bool take_locked(Request& request);
  void cut(Operation& operation, Request& request) const;
  void come_back(Request& request, std::size_t bytes, std::optional<Failure> failure);
  void complete_locked(const std::shared_ptr<Operation>& operation);
  bool retry(Request& request) const;
};

// A page-aligned buffer, allocated at first use.
class Bounce {
 public:
  explicit Bounce(std::size_t size) : size_(size) {}
  ~Bounce();
  Bounce(Bounce&& other) noexcept;
  Bounce& operator=(Bounce&&) = delete;
  char* data();  // null if there is no memory

 private:
  std::size_t size_;
  char* data_ = nullptr;
};

// Whether the address of a direct request is unaligned, so that it has to go through a Bounce.
inline bool needs_bounce(const Request& request) {
  return request.direct &&
         reinterpret_cast<std::uintptr_t>(request.data) % request.operation->file->memory_alignment() != 0;
}

// Runs one worker, on the calling thread, until the engine ends.
void run_thread_worker(const std::shared_ptr<State>& state);

}  // namespace ds::io
