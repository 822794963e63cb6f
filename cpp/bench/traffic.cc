// The memory traffic of a kernel without its arithmetic: the speed that no implementation can exceed by much.
#include <algorithm>
#include <cstdint>

#include "ds/parallel.h"

namespace {

using Word = std::uint32_t;

constexpr std::int64_t kLine = 16;  // words of a cache line
// Eight words as one value: loaded before anything is stored, whatever the compiler knows of the pointers.
using Words [[gnu::vector_size(32), gnu::aligned(4), gnu::may_alias]] = Word;
constexpr std::int64_t kAhead = 256;  // words from a load to the prefetch that precedes it

inline Words* at(Word* p) { return reinterpret_cast<Words*>(p); }
inline const Words* at(const Word* p) { return reinterpret_cast<const Words*>(p); }

// Reads four arrays and writes three, as Adam does with fp32 everywhere. Bitwise operations: no rounding, no
// denormals, and nothing that a compiler may leave out. Asks for lines ahead of their use: without that the
// loop, which has nothing to do while it waits, can be slower than Adam itself, and is no limit.
#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void read4_write3(Word* a, Word* b, Word* c, const Word* d, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    __builtin_prefetch(a + i + kAhead, 1);
    __builtin_prefetch(b + i + kAhead, 1);
    __builtin_prefetch(c + i + kAhead, 1);
    __builtin_prefetch(d + i + kAhead, 0);
    for (std::int64_t k = i; k < i + kLine; k += kLine / 2) {
      const Words x = *at(a + k), y = *at(b + k), z = *at(c + k), w = *at(d + k);
      *at(a + k) = x ^ w;
      *at(b + k) = y ^ w;
      *at(c + k) = z ^ w;
    }
  }
  for (; i < n; ++i) {
    const Word w = d[i];
    a[i] ^= w;
    b[i] ^= w;
    c[i] ^= w;
  }
}

// Reads three arrays and writes two, as an optimizer with one state does.
#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void read3_write2(Word* a, Word* b, const Word* c, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    __builtin_prefetch(a + i + kAhead, 1);
    __builtin_prefetch(b + i + kAhead, 1);
    __builtin_prefetch(c + i + kAhead, 0);
    for (std::int64_t k = i; k < i + kLine; k += kLine / 2) {
      const Words x = *at(a + k), y = *at(b + k), z = *at(c + k);
      *at(a + k) = x ^ z;
      *at(b + k) = y ^ z;
    }
  }
  for (; i < n; ++i) {
    const Word z = c[i];
    a[i] ^= z;
    b[i] ^= z;
  }
}

// Calls loop(begin, length) for chunks of the sizes that the kernels have.
template <class Loop>
void in_chunks(std::int64_t numel, int threads, Loop loop) {
  const std::int64_t chunk_numel = std::clamp<std::int64_t>(numel / (32 * threads), 32 * 1024, 256 * 1024);
  ds::parallel_for((numel + chunk_numel - 1) / chunk_numel, threads, [&](std::int64_t chunk) {
    const std::int64_t begin = chunk * chunk_numel;
    loop(begin, numel - begin < chunk_numel ? numel - begin : chunk_numel);
  });
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void ds_bench_read4_write3(Word* a, Word* b, Word* c,
                                                                             const Word* d,
                                                                             std::int64_t numel,
                                                                             int threads) {
  in_chunks(numel, threads, [&](std::int64_t begin, std::int64_t length) {
    read4_write3(a + begin, b + begin, c + begin, d + begin, length);
  });
}

extern "C" __attribute__((visibility("default"))) void ds_bench_read3_write2(Word* a, Word* b, const Word* c,
                                                                             std::int64_t numel,
                                                                             int threads) {
  in_chunks(numel, threads, [&](std::int64_t begin, std::int64_t length) {
    read3_write2(a + begin, b + begin, c + begin, length);
  });
}
