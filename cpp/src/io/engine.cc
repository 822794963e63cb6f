#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include "ring.h"
#include "state.h"

namespace ds::io {
namespace {

constexpr unsigned kRegistered = 1024;          // ranges of registered memory
constexpr std::size_t kLargestRange = 1 << 30;  // the kernel's limit

using Workers = std::vector<std::shared_ptr<RingWorker>>;

// The engine itself: the state that workers share, and what only its owner needs.
struct Owner : State {
  using State::State;
  Workers rings;
  std::mutex registering;  // guards what follows
  std::string cannot_register;
  std::vector<bool> used;  // which indices of registered memory are taken

  int add(std::uintptr_t begin, std::size_t size, bool continues);
  void forget(std::uintptr_t begin);
};

int Owner::add(std::uintptr_t begin, std::size_t size, bool continues) {
  const auto free = std::find(used.begin(), used.end(), false);
  if (free == used.end()) return -ENOSPC;
  const auto index = static_cast<unsigned>(free - used.begin());
  for (const auto& worker : rings) {
    const int result = worker->ring().set_buffer(index, reinterpret_cast<void*>(begin), size);
    if (result < 0) return result;
  }
  *free = true;
  const std::lock_guard lock(mutex);
  registered[begin] = {static_cast<int>(index), size, continues};
  return 0;
}

void Owner::forget(std::uintptr_t begin) {
  for (bool more = true; more;) {
    Registered range{};
    {
      const std::lock_guard lock(mutex);
      const auto entry = registered.find(begin);
      if (entry == registered.end()) return;
      range = entry->second;
      registered.erase(entry);
    }
    for (const auto& worker : rings) {
      (void)worker->ring().set_buffer(static_cast<unsigned>(range.index), nullptr, 0);
    }
    used[static_cast<std::size_t>(range.index)] = false;
    more = range.continues;
    begin += range.size;
  }
}

Owner& owner(const std::shared_ptr<State>& state) { return static_cast<Owner&>(*state); }

Options checked(Options options) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  options.block_bytes = std::clamp<std::size_t>(options.block_bytes, page, kLargestRange);
  options.block_bytes = (options.block_bytes + page - 1) / page * page;
  options.queue_depth = std::clamp(options.queue_depth, 1u, 4096u);
  return options;
}

std::string explain(const SystemError& error) {
  std::string text = "io_uring: " + std::string(error.what());
  if (error.code == EPERM) text += " (forbidden by sysctl kernel.io_uring_disabled or a seccomp filter)";
  if (error.code == ENOSYS || error.code == EOPNOTSUPP) text += " (it needs Linux 5.6)";
  if (error.code == ENOMEM) text += " (the limit of locked memory, ulimit -l, is too low)";
  return text;
}

// A thread that gets no signal: they are for threads that know what to do with them.
template <class Body>
void start_thread(Body body) {
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    std::thread(std::move(body)).detach();
  } catch (...) {
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw SystemError("pthread_create", EAGAIN);
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

template <class Done>
bool wait_until(const State& state, double seconds, Done done) {
  std::unique_lock lock(state.mutex);
  auto& finished = const_cast<State&>(state).finished;
  return finished.wait_for(lock, std::chrono::duration<double>(seconds), done);
}

}  // namespace

Engine::Engine(const Options& options) {
  const auto state = std::make_shared<Owner>(checked(options));
  state_ = state;
  state->process = ::getpid();
  unsigned num_workers = options.num_threads;
  if (options.backend != Backend::kThreads) {
    const unsigned num_rings = std::clamp(num_workers, 1u, state->options.queue_depth);
    try {
      for (unsigned i = 0; i < num_rings; ++i) {
        state->rings.push_back(std::make_shared<RingWorker>(state, state->options.queue_depth / num_rings));
      }
      state->backend = Backend::kUring;
      num_workers = num_rings;
    } catch (const SystemError& error) {
      state->rings.clear();
      if (options.backend == Backend::kUring) throw;
      reason_ = explain(error);
    }
  } else {
    reason_ = "the engine was made with backend=\"threads\"";
  }
  // One thread fills a ring, but without rings a thread has one request in flight.
  if (state->rings.empty() && (num_workers == 0 || options.backend == Backend::kAuto)) {
    num_workers = std::max(num_workers, std::min(state->options.queue_depth, 8u));
  }
  try {
    for (unsigned i = 0; i < num_workers; ++i) {
      {
        const std::lock_guard lock(state->mutex);
        ++state->num_workers;
      }
      try {
        if (state->backend == Backend::kUring) {
          start_thread([worker = state->rings[i]] { worker->run(); });
        } else {
          start_thread([shared = state_] { run_thread_worker(shared); });
        }
      } catch (...) {
        const std::lock_guard lock(state->mutex);
        --state->num_workers;
        throw;
      }
    }
  } catch (...) {
    stop();
    throw;
  }
}

Engine::~Engine() {
  if (!in_process_of_creation()) {
    // The memory of rings and of locks belongs to workers that this process does not have.
    new std::shared_ptr<State>(std::move(state_));
    return;
  }
  stop();
  // Workers hold the state until they end; the references between state and rings form a cycle.
  if (wait_until(*state_, 1.0, [this] { return state_->num_workers == 0; })) owner(state_).rings.clear();
}

Backend Engine::backend() const { return state_->backend; }

bool Engine::in_process_of_creation() const { return state_->process == ::getpid(); }

void Engine::check_process() const {
  if (in_process_of_creation()) return;
  throw std::logic_error("this I/O engine was made in process " + std::to_string(state_->process) +
                         ", and its threads do not exist in the forked process " +
                         std::to_string(::getpid()) + "; make an engine after the fork");
}

std::shared_ptr<File> Engine::open(const std::string& path, const OpenOptions& options) {
  check_process();
  return std::make_shared<File>(path, options, state_->options.direct);
}

std::shared_ptr<Operation> Engine::submit(Kind kind, std::shared_ptr<File> file, void* data, std::size_t size,
                                          std::int64_t offset) {
  check_process();
  auto operation = std::make_shared<Operation>(kind, std::move(file), static_cast<char*>(data), size, offset);
  if (size == 0) {
    operation->done = true;
    return operation;
  }
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->stopping) throw std::logic_error("the I/O engine is closed");
    state_->queue.push_back(operation);
    ++state_->pending[operation->file.get()];
    ++state_->num_pending;
  }
  if (state_->backend == Backend::kUring) {
    for (const auto& worker : owner(state_).rings) worker->wake();
  } else {
    state_->available.notify_all();
  }
  return operation;
}

bool Engine::wait(const Operation* operation, double seconds) {
  check_process();
  if (operation != nullptr && operation->done.load(std::memory_order_acquire)) return true;
  return wait_until(*state_, seconds, [&] {
    return operation == nullptr ? state_->num_pending == 0 : operation->done.load(std::memory_order_acquire);
  });
}

bool Engine::wait(const File& file, double seconds) {
  check_process();
  return wait_until(*state_, seconds, [&] { return state_->pending.count(&file) == 0; });
}

std::uint64_t Engine::progress() const { return state_->progress.load(std::memory_order_relaxed); }

std::vector<std::shared_ptr<Operation>> Engine::unseen_failures(const File* file) {
  check_process();
  std::vector<std::shared_ptr<Operation>> unseen;
  const std::lock_guard lock(state_->mutex);
  auto& failed = state_->failed;
  for (const auto& operation : failed) {
    const bool wanted = file == nullptr || operation->file.get() == file;
    if (wanted && !operation->seen) unseen.push_back(operation);
  }
  for (const auto& operation : unseen) operation->seen = true;
  std::erase_if(failed, [](const auto& operation) { return operation->seen.load(); });
  return unseen;
}

bool Engine::stop() {
  if (!in_process_of_creation()) return true;
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
    state_->cancel_queue();
  }
  state_->available.notify_all();
  for (const auto& worker : owner(state_).rings) worker->wake();
  const std::lock_guard lock(state_->mutex);
  return state_->num_pending == 0;
}

std::string Engine::register_memory(void* data, std::size_t size) {
  check_process();
  Owner& all = owner(state_);
  if (all.backend != Backend::kUring) return "only io_uring registers memory";
  const std::lock_guard registering(all.registering);
  if (!all.cannot_register.empty()) return all.cannot_register;
  for (const auto& worker : all.rings) {
    if (!all.used.empty()) break;
    if (const int result = worker->ring().reserve_buffers(kRegistered); result < 0) {
      all.cannot_register = std::string("registering memory needs Linux 5.19: ") + std::strerror(-result);
      return all.cannot_register;
    }
  }
  all.used.resize(kRegistered);
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  for (std::size_t begin = 0; begin < size; begin += kLargestRange) {
    const std::size_t bytes = std::min(size - begin, kLargestRange);
    if (const int result = all.add(address + begin, bytes, begin + bytes < size); result < 0) {
      all.forget(address);
      std::string text = "the system does not register " + std::to_string(size) + " bytes of memory: ";
      text += std::strerror(-result);
      if (result == -ENOMEM) text += "; raise the limit of locked memory (ulimit -l)";
      return text;
    }
  }
  return "";
}

void Engine::forget_memory(void* data) {
  check_process();
  Owner& all = owner(state_);
  const std::lock_guard registering(all.registering);
  all.forget(reinterpret_cast<std::uintptr_t>(data));
}

bool is_done(const Operation& operation) { return operation.done.load(std::memory_order_acquire); }

Status status(const Operation& operation) {
  Operation& seen = const_cast<Operation&>(operation);
  Status result{operation.done.load(std::memory_order_acquire), std::nullopt, operation.bytes_done};
  if (result.done) {  // from here on, nobody writes to it
    result.failure = operation.failure;
    seen.seen = true;
  }
  return result;
}

const File& file_of(const Operation& operation) { return *operation.file; }
Kind kind_of(const Operation& operation) { return operation.kind; }
std::int64_t offset_of(const Operation& operation) { return operation.offset; }
std::size_t size_of(const Operation& operation) { return operation.size; }

std::string uring_reason() {
  try {
    const Ring ring(1);
    return "";
  } catch (const SystemError& error) {
    return explain(error);
  }
}

}  // namespace ds::io
