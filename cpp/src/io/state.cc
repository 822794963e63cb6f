#include "state.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <thread>

namespace ds::io {

bool State::take(Request& request) {
  const std::lock_guard lock(mutex);
  return take_locked(request);
}

bool State::wait_and_take(Request& request) {
  std::unique_lock lock(mutex);
  for (;;) {
    if (take_locked(request)) return true;
    if (stopping) return false;
    available.wait(lock);
  }
}

bool State::should_end() const {
  const std::lock_guard lock(mutex);
  return stopping && queue.empty();
}

bool State::take_locked(Request& request) {
  while (!queue.empty()) {
    Operation& operation = *queue.front();
    if (operation.cut == operation.size) {  // it failed, and nothing more of it is wanted
      queue.pop_front();
      continue;
    }
    request = Request{};
    request.operation = queue.front();
    cut(operation, request);
    operation.cut += request.size;
    ++operation.num_outstanding;
    if (operation.cut == operation.size) queue.pop_front();
    return true;
  }
  return false;
}

// [Note: direct I/O and its edges]
void State::cut(Operation& operation, Request& request) const {
  const File& file = *operation.file;
  request.data = operation.data + operation.cut;
  request.offset = operation.offset + static_cast<std::int64_t>(operation.cut);
  const std::size_t rest = operation.size - operation.cut;
  request.size = std::min(rest, options.block_bytes);
  if (file.direct()) {
    const std::size_t unit = file.unit();
    const std::size_t beyond = static_cast<std::size_t>(request.offset) % unit;
    if (beyond != 0) {
      request.size = std::min(rest, unit - beyond);
    } else if (rest >= unit) {
      request.direct = true;
      request.size = std::min(rest, std::max(options.block_bytes, unit)) / unit * unit;
    }
  }
  if (registered.empty()) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(request.data);
  auto range = registered.upper_bound(begin);
  if (range == registered.begin()) return;
  --range;
  if (begin + request.size <= range->first + range->second.size) request.buffer_index = range->second.index;
}

Next State::settle(Request& request, ssize_t result) {
  const Operation& operation = *request.operation;
  File& file = *operation.file;
  if (result < 0) {
    const int code = static_cast<int>(-result);
    if ((code == EINTR || code == EAGAIN) && retry(request)) return Next::kReissue;
    if (code == EFAULT && request.buffer_index >= 0) {  // the memory was forgotten meanwhile
      request.buffer_index = -1;
      return Next::kReissue;
    }
    if (code == EINVAL && request.direct) {
      file.refuse_direct("a direct request of " + std::to_string(request.size) + " bytes at offset " +
                         std::to_string(request.offset) + " failed: Invalid argument");
      request.direct = false;
      request.buffer_index = -1;
      return Next::kReissue;
    }
    come_back(request, 0, Failure{code, request.offset, -1});
    return Next::kFinished;
  }
  progress.fetch_add(1, std::memory_order_relaxed);
  if (result == 0) {
    Failure failure{EIO, request.offset, -1};
    if (operation.kind == Kind::kRead) {
      failure.code = ENODATA;
      try {
        failure.file_bytes = file.num_bytes();
      } catch (const SystemError&) {
        failure.file_bytes = request.offset;
      }
    }
    come_back(request, 0, failure);
    return Next::kFinished;
  }
  const auto bytes = static_cast<std::size_t>(result);
  request.num_retries = 0;
  request.data += bytes;
  request.offset += result;
  request.size -= bytes;
  if (request.size == 0) {
    come_back(request, bytes, std::nullopt);
    return Next::kFinished;
  }
  request.operation->bytes_done += result;
  // A part was transferred. The rest may begin anywhere, and nobody else is at its pages.
  if (request.direct && static_cast<std::size_t>(request.offset) % file.unit() != 0) request.direct = false;
  return Next::kReissue;
}

// False once the kernel has refused the same request for too long.
bool State::retry(Request& request) const {
  const Clock::time_point now = Clock::now();
  if (request.num_retries++ == 0) request.retry_since = now;
  if (request.num_retries > 16) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return std::chrono::duration<double>(now - request.retry_since).count() < options.stall_limit_s;
}

void State::come_back(Request& request, std::size_t bytes, std::optional<Failure> failure) {
  const std::shared_ptr<Operation> operation = std::move(request.operation);
  const std::lock_guard lock(mutex);
  operation->bytes_done += static_cast<std::int64_t>(bytes);
  if (failure && !operation->failure) {
    operation->failure = failure;
    operation->cut = operation->size;  // the rest is not tried
  }
  --operation->num_outstanding;
  if (operation->num_outstanding == 0 && operation->cut == operation->size) complete_locked(operation);
}

void State::complete_locked(const std::shared_ptr<Operation>& operation) {
  if (operation->failure) {
    std::erase_if(failed, [](const auto& other) { return other->seen.load(); });
    failed.push_back(operation);
  }
  const auto of_file = pending.find(operation->file.get());
  if (--of_file->second == 0) pending.erase(of_file);
  --num_pending;
  operation->done.store(true, std::memory_order_release);
  finished.notify_all();
}

void State::cancel_queue() {
  std::deque<std::shared_ptr<Operation>> cancelled;
  cancelled.swap(queue);
  for (const std::shared_ptr<Operation>& operation : cancelled) {
    if (operation->cut == operation->size) continue;
    operation->failure =
        Failure{ECANCELED, operation->offset + static_cast<std::int64_t>(operation->cut), -1};
    operation->cut = operation->size;
    if (operation->num_outstanding == 0) complete_locked(operation);
  }
}

void State::worker_ends() {
  const std::lock_guard lock(mutex);
  --num_workers;
  finished.notify_all();
}

Bounce::~Bounce() { std::free(data_); }

Bounce::Bounce(Bounce&& other) noexcept : size_(other.size_), data_(other.data_) { other.data_ = nullptr; }

char* Bounce::data() {
  if (data_ == nullptr) {
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    data_ = static_cast<char*>(std::aligned_alloc(page, (size_ + page - 1) / page * page));
  }
  return data_;
}

}  // namespace ds::io
