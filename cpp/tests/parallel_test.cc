#include "ds/parallel.h"

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "check.h"
#include "dispatch/pool.h"
#include "dispatch/shares.h"

using namespace ds;

namespace {

void check_each_once(void (*run)(std::int64_t, int, ChunkFn), std::int64_t chunks, int threads) {
  std::vector<std::atomic<int>> seen(static_cast<std::size_t>(chunks));
  auto body = [&](std::int64_t chunk) { seen[static_cast<std::size_t>(chunk)].fetch_add(1); };
  run(chunks, threads, body);
  for (const auto& count : seen) CHECK_EQ(count.load(), 1);
}

void on_the_pool(std::int64_t chunks, int threads, ChunkFn fn) { pool_run(chunks, threads, fn); }

}  // namespace

TEST(each_chunk_runs_once) {
  for (const int threads : {1, 2, 4}) {
    for (const std::int64_t chunks : {0, 1, 2, 3, 1000}) {
      check_each_once(parallel_for, chunks, threads);
      if (chunks > 0) check_each_once(on_the_pool, chunks, threads);
    }
  }
}

TEST(bound_threads_compute_on_their_cores_only) {
  cpu_set_t before, after;
  CHECK_EQ(sched_getaffinity(0, sizeof(before), &before), 0);
  std::vector<int> cores;
  for (int core = 0; core < CPU_SETSIZE && cores.size() < 2; ++core)
    if (CPU_ISSET(core, &before)) cores.push_back(core);
  const int only = cores.back();
  compute_on({only});
  std::atomic<int> elsewhere{0};
  for (const int threads : {1, 3})
    parallel_for(1000, threads, [&](std::int64_t) { elsewhere.fetch_add(sched_getcpu() != only); });
  CHECK_EQ(elsewhere.load(), 0);
  check_each_once(parallel_for, 1000, 3);
  const int impossible = CPU_SETSIZE - 1;
  compute_on({impossible});
  check_each_once(parallel_for, 1000, 3);
  compute_on({});
  CHECK_EQ(sched_getaffinity(0, sizeof(after), &after), 0);
  CHECK(CPU_EQUAL(&before, &after));
}

TEST(a_thread_begins_with_its_own_share) {
  Shares shares(10, 3);  // 0 to 3, 4 to 6, 7 to 9
  std::vector<std::int64_t> order;
  shares.take(1, [&](std::int64_t chunk) { order.push_back(chunk); });
  CHECK((order == std::vector<std::int64_t>{4, 5, 6, 7, 8, 9, 0, 1, 2, 3}));
  shares.take(0, [&](std::int64_t chunk) { order.push_back(chunk); });
  CHECK_EQ(order.size(), 10u);
}

TEST(the_pool_serves_many_callers_at_once) {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([] {
      for (int round = 0; round < 200; ++round) check_each_once(on_the_pool, 7, 3);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

TEST(a_forked_child_has_threads_too) {
  check_each_once(parallel_for, 10, 3);  // the parent's workers exist before the fork
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    std::atomic<int> count{0};
    parallel_for(100, 3, [&](std::int64_t) { count.fetch_add(1); });
    _exit(count.load() == 100 && std::string(thread_source()) == "own" ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
