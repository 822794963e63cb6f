#include "dispatch/pool.h"

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "dispatch/shares.h"

namespace ds {
namespace {

struct Job {
  Job(std::int64_t n, int num_threads, ChunkFn f, std::vector<int> c)
      : num_chunks(n), workers_wanted(num_threads - 1), shares(n, num_threads), fn(f), cores(std::move(c)) {}
  const std::int64_t num_chunks;
  int workers_wanted;  // guarded by the pool's mutex
  Shares shares;
  ChunkFn fn;
  const std::vector<int> cores;
  std::atomic<std::int64_t> done{0};
};

// Binds this thread to one core while it lives.
class Bound {
 public:
  Bound(const std::vector<int>& cores, int thread) {
    if (cores.empty() || sched_getaffinity(0, sizeof(before_), &before_) != 0) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cores[static_cast<std::size_t>(thread) % cores.size()], &one);
    bound_ = sched_setaffinity(0, sizeof(one), &one) == 0;
  }
  ~Bound() {
    if (bound_) sched_setaffinity(0, sizeof(before_), &before_);
  }
  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;

 private:
  cpu_set_t before_;
  bool bound_ = false;
};

// A worker that wakes up late holds the job alive, finds no chunk left and never touches fn, whose frame may
// be gone.
void work(Job& job, int thread) {
  const Bound bound(job.cores, thread);
  job.shares.take(thread, [&](std::int64_t chunk) {
    job.fn(chunk);
    if (job.done.fetch_add(1, std::memory_order_acq_rel) + 1 == job.num_chunks) job.done.notify_all();
  });
}

class Pool {
 public:
  void run(std::int64_t num_chunks, int num_threads, ChunkFn fn, const std::vector<int>& cores) {
    auto job = std::make_shared<Job>(num_chunks, num_threads, fn, cores);
    if (num_threads > 1) {
      std::lock_guard lock(mutex_);
      while (num_workers_ < num_threads - 1) {
        std::thread([this, thread = ++num_workers_] { loop(thread); }).detach();
      }
      jobs_.push_back(job);
    }
    wake_.notify_all();
    work(*job, 0);
    for (std::int64_t done = job->done.load(); done != num_chunks; done = job->done.load())
      job->done.wait(done);
  }

 private:
  [[noreturn]] void loop(int thread) {
    for (;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [this] { return !jobs_.empty(); });
        job = jobs_.front();
        if (--job->workers_wanted <= 0) jobs_.pop_front();
      }
      work(*job, thread);
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

void pool_run(std::int64_t num_chunks, int num_threads, ChunkFn fn, const std::vector<int>& cores) {
  Pool* pool = g_pool.load(std::memory_order_acquire);
  if (pool == nullptr) {
    auto* fresh = new Pool;
    if (g_pool.compare_exchange_strong(pool, fresh)) {
      pool = fresh;
    } else {
      delete fresh;
    }
  }
  pool->run(num_chunks, num_threads, fn, cores);
}

void pool_forget() { g_pool.store(nullptr, std::memory_order_release); }

}  // namespace ds
