// Threads for the CPU kernels.
//
// [Note: shared OpenMP threads] torch's idle OpenMP threads spin for some milliseconds after a parallel
// region. A second pool of threads would compete with them for the cores, and be up to twice as slow. So the
// kernels run on the threads of the OpenMP runtime that is already loaded in the process (looked up at run
// time, not linked). If there is none, they use a pool of their own, and also in a forked child, where the
// OpenMP runtime would wait for threads that fork() did not copy.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace ds {

// A non-owning reference to a callable: void(int64_t).
class ChunkFn {
 public:
  template <class F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, ChunkFn>)  // else a copy would refer to the original
  ChunkFn(F&& f)  // NOLINT: implicit by design, as a parameter type
      : object_(const_cast<void*>(static_cast<const void*>(&f))), call_([](void* object, std::int64_t chunk) {
          (*static_cast<std::remove_reference_t<F>*>(object))(chunk);
        }) {}
  void operator()(std::int64_t chunk) const { call_(object_, chunk); }

 private:
  void* object_;
  void (*call_)(void*, std::int64_t);
};

// Calls fn(chunk) once for each chunk in [0, num_chunks), on at most num_threads threads, one of them the
// caller's. Each thread begins with its own share of neighbouring chunks and goes on with the others'
// ([Note: shares]). Workers run in the caller's floating-point mode (rounding, denormals). fn must not throw.
void parallel_for(std::int64_t num_chunks, int num_threads, ChunkFn fn);

// Binds what parallel_for computes for this thread from now on to these cores, one thread a core: on the own
// pool, because binding torch's threads would bind torch, too. The caller's thread is bound while it
// computes. Cores that the process may not use have no effect. Empty: on any core. Returns the cores before.
std::vector<int> compute_on(std::vector<int> cores);

// Where the threads come from: "openmp" (borrowed) or "own".
const char* thread_source();

}  // namespace ds
