// The own thread pool, for processes without a usable OpenMP runtime.
#pragma once

#include <cstdint>
#include <vector>

#include "ds/parallel.h"

namespace ds {

// As parallel_for. Returns when all chunks are done, not when all workers have woken up. Thread i computes on
// cores[i % cores.size()], if there are any.
void pool_run(std::int64_t num_chunks, int num_threads, ChunkFn fn, const std::vector<int>& cores = {});

// In a forked child: forget threads that were not copied.
void pool_forget();

}  // namespace ds
