#include "ds/parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "dispatch/pool.h"
#include "dispatch/shares.h"

namespace ds {
namespace {

// The entry that GCC's OpenMP runtime gives compiled code (LLVM's and Intel's runtimes have it too), and
// OpenMP's own call for a thread's number in its team.
struct OpenMP {
  void (*parallel)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
};

struct Search {
  std::string_view prefix;
  std::string path;
};

int match_library(dl_phdr_info* info, std::size_t, void* data) {
  auto* search = static_cast<Search*>(data);
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const std::string_view base = slash == nullptr ? info->dlpi_name : slash + 1;
  if (base.substr(0, search->prefix.size()) != search->prefix) return 0;
  search->path = info->dlpi_name;
  return 1;
}

// libtorch_cpu first: a lookup through its handle follows its own dependencies, so that the runtime found is
// the one torch uses, even where the process holds several.
OpenMP find_openmp() {
  for (const char* prefix : {"libtorch_cpu.", "libgomp", "libomp", "libiomp5"}) {
    Search search{prefix, {}};
    dl_iterate_phdr(match_library, &search);
    if (search.path.empty()) continue;
    void* library = dlopen(search.path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    OpenMP found;
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
    found.thread_num = reinterpret_cast<decltype(found.thread_num)>(dlsym(library, "omp_get_thread_num"));
    if (found.parallel != nullptr && found.thread_num != nullptr)
      return found;  // keeps the handle: never unloaded
    dlclose(library);
  }
  return {};
}

std::atomic<bool> g_forked{false};

void after_fork() {
  g_forked.store(true);
  pool_forget();
}

// When the library is loaded and not at the first kernel: a child may be the first to call one.
[[maybe_unused]] const int g_fork_handler = pthread_atfork(nullptr, nullptr, after_fork);

// Without an entry where the own threads have to do.
OpenMP openmp() {
  static const OpenMP found = [] {
    // For tests and for measuring the pool itself.
    const char* source = std::getenv("DS_THREADS");
    return source != nullptr && std::strcmp(source, "own") == 0 ? OpenMP{} : find_openmp();
  }();
  return g_forked.load(std::memory_order_relaxed) ? OpenMP{} : found;
}

#if defined(__x86_64__)
unsigned float_mode() { return _mm_getcsr(); }
void set_float_mode(unsigned mode) { _mm_setcsr(mode); }
#else
unsigned float_mode() { return 0; }
void set_float_mode(unsigned) {}
#endif

thread_local std::vector<int> t_cores;

struct Team {
  Shares shares;
  ChunkFn fn;
  unsigned mode;
  int (*thread_num)();
};

void take_chunks(void* data) {
  auto* team = static_cast<Team*>(data);
  const unsigned mode = float_mode();
  set_float_mode(team->mode);
  team->shares.take(team->thread_num(), team->fn);
  set_float_mode(mode);
}

}  // namespace

std::vector<int> compute_on(std::vector<int> cores) { return std::exchange(t_cores, std::move(cores)); }

void parallel_for(std::int64_t num_chunks, int num_threads, ChunkFn fn) {
  const auto threads = static_cast<int>(std::min<std::int64_t>(num_threads, num_chunks));
  if (num_chunks == 0 || (threads <= 1 && t_cores.empty())) {
    for (std::int64_t chunk = 0; chunk < num_chunks; ++chunk) fn(chunk);
    return;
  }
  if (const OpenMP runtime = openmp(); runtime.parallel != nullptr && t_cores.empty()) {
    Team team{{num_chunks, threads}, fn, float_mode(), runtime.thread_num};
    runtime.parallel(take_chunks, &team, static_cast<unsigned>(threads), 0);
    return;
  }
  const unsigned mode = float_mode();
  auto in_mode = [&](std::int64_t chunk) {
    const unsigned previous = float_mode();
    set_float_mode(mode);
    fn(chunk);
    set_float_mode(previous);
  };
  pool_run(num_chunks, threads, in_mode, t_cores);
}

const char* thread_source() { return openmp().parallel != nullptr ? "openmp" : "own"; }

}  // namespace ds
