#include "dispatch/pool.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

namespace ds {
namespace {

struct Job {
  Job(std::int64_t n, int workers, ChunkFn f) : num_chunks(n), workers_wanted(workers), fn(f) {}
  const std::int64_t num_chunks;
  int workers_wanted;  // guarded by the pool's mutex
  ChunkFn fn;
  std::atomic<std::int64_t> next{0};
  std::atomic<std::int64_t> done{0};
};

// A worker that wakes up late holds the job alive, finds no chunk left and never touches fn, whose frame may
// be gone.
void work(Job& job) {
  for (;;) {
    const std::int64_t chunk = job.next.fetch_add(1, std::memory_order_relaxed);
    if (chunk >= job.num_chunks) return;
    job.fn(chunk);
    if (job.done.fetch_add(1, std::memory_order_acq_rel) + 1 == job.num_chunks) job.done.notify_all();
  }
}

class Pool {
 public:
  void run(std::int64_t num_chunks, int num_threads, ChunkFn fn) {
    auto job = std::make_shared<Job>(num_chunks, num_threads - 1, fn);
    {
      std::lock_guard lock(mutex_);
      while (num_workers_ < num_threads - 1) {
        std::thread([this] { loop(); }).detach();
        ++num_workers_;
      }
      jobs_.push_back(job);
    }
    wake_.notify_all();
    work(*job);
    for (std::int64_t done = job->done.load(); done != num_chunks; done = job->done.load())
      job->done.wait(done);
  }

 private:
  [[noreturn]] void loop() {
    for (;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [this] { return !jobs_.empty(); });
        job = jobs_.front();
        if (--job->workers_wanted <= 0) jobs_.pop_front();
      }
      work(*job);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> jobs_;
  int num_workers_ = 0;
};

// Never deleted: detached workers refer to it until the process ends.
std::atomic<Pool*> g_pool{nullptr};

}  // namespace

void pool_run(std::int64_t num_chunks, int num_threads, ChunkFn fn) {
  Pool* pool = g_pool.load(std::memory_order_acquire);
  if (pool == nullptr) {
    auto* fresh = new Pool;
    if (g_pool.compare_exchange_strong(pool, fresh)) {
      pool = fresh;
    } else {
      delete fresh;
    }
  }
  pool->run(num_chunks, num_threads, fn);
}

void pool_forget() { g_pool.store(nullptr, std::memory_order_release); }

}  // namespace ds
