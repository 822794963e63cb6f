// The memory traffic of a kernel without its arithmetic: the speed that no implementation can exceed by much.
#include <cstdint>

#include "ds/parallel.h"

namespace {

using Word = std::uint32_t;

// Reads four arrays and writes three, as Adam does with fp32 everywhere. Bitwise operations: no rounding, no
// denormals, and nothing that a compiler may leave out.
#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void read4_write3(Word* a, Word* b, Word* c, const Word* d, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    const Word x = a[i], y = b[i], z = c[i], w = d[i];
    a[i] = x ^ w;
    b[i] = y ^ w;
    c[i] = z ^ w;
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void ds_bench_read4_write3(Word* a, Word* b, Word* c,
                                                                             const Word* d,
                                                                             std::int64_t numel,
                                                                             int threads) {
  constexpr std::int64_t kChunk = 32 * 1024;
  ds::parallel_for((numel + kChunk - 1) / kChunk, threads, [&](std::int64_t chunk) {
    const std::int64_t begin = chunk * kChunk;
    const std::int64_t length = numel - begin < kChunk ? numel - begin : kChunk;
    read4_write3(a + begin, b + begin, c + begin, d + begin, length);
  });
}
