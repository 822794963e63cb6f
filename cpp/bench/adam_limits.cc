// What limits Adam on data in the cache: one thread, AVX2, nanoseconds per parameter of Adam and of parts of
// it.
//
//   cmake --build build/bench --target ds_bench_adam_limits && build/bench/cpp/bench/ds_bench_adam_limits
//
// "nothing" only moves the data. "square root", "division" and "both" add those; "adam" is the whole formula
// as the kernels have it, "adam with FMA" the same with fused multiply-adds; "adam, Newton" divides by a
// reciprocal from fused multiply-adds alone (integer seed, two steps, one correction) and leaves only the
// square root to the divider.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>

#if defined(__x86_64__)
#include <immintrin.h>

#define DS_AVX2 __attribute__((target("avx2,fma")))
#define DS_STEP DS_AVX2 __attribute__((always_inline)) static inline

namespace {

using V = __m256;

struct Moments {
  V m, v;
};

DS_STEP V set(float x) { return _mm256_set1_ps(x); }
DS_STEP V mul(V a, V b) { return _mm256_mul_ps(a, b); }
DS_STEP V add(V a, V b) { return _mm256_add_ps(a, b); }

struct Nothing {
  DS_STEP V step(V p, V g, Moments& s) {
    s = {_mm256_xor_ps(s.m, g), _mm256_xor_ps(s.v, g)};
    return _mm256_xor_ps(p, g);
  }
};
struct Root {
  DS_STEP V step(V p, V, Moments& s) { return add(p, _mm256_sqrt_ps(s.v)); }
};
struct Division {
  DS_STEP V step(V p, V, Moments& s) { return add(p, _mm256_div_ps(s.m, s.v)); }
};
struct Both {
  DS_STEP V step(V p, V, Moments& s) {
    return add(p, _mm256_div_ps(s.m, add(_mm256_sqrt_ps(s.v), set(1e-8f))));
  }
};
struct Adam {
  DS_STEP V step(V p, V g, Moments& s) {
    g = mul(g, set(0.5f));
    s.m = add(mul(s.m, set(0.9f)), mul(set(0.1f), g));
    s.v = add(mul(s.v, set(0.999f)), mul(mul(set(0.001f), g), g));
    const V root = add(mul(_mm256_sqrt_ps(s.v), set(20.0f)), set(1e-8f));
    return add(mul(p, set(0.99999f)), _mm256_div_ps(mul(set(-1e-3f), s.m), root));
  }
};

DS_STEP V moments_with_fma(V g, Moments& s) {
  g = mul(g, set(0.5f));
  s.m = _mm256_fmadd_ps(s.m, set(0.9f), mul(set(0.1f), g));
  s.v = _mm256_fmadd_ps(s.v, set(0.999f), mul(mul(set(0.001f), g), g));
  return _mm256_fmadd_ps(_mm256_sqrt_ps(s.v), set(20.0f), set(1e-8f));
}

struct Fused {
  DS_STEP V step(V p, V g, Moments& s) {
    const V root = moments_with_fma(g, s);
    return _mm256_fmadd_ps(p, set(0.99999f), _mm256_div_ps(mul(set(-1e-3f), s.m), root));
  }
};
struct Newton {
  DS_STEP V step(V p, V g, Moments& s) {
    const V d = moments_with_fma(g, s);
    V y = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32(0x7eeb5000), _mm256_castps_si256(d)));
    y = _mm256_fmadd_ps(y, _mm256_fnmadd_ps(d, y, set(1.0f)), y);
    y = _mm256_fmadd_ps(y, _mm256_fnmadd_ps(d, y, set(1.0f)), y);
    const V n = mul(set(-1e-3f), s.m);
    const V q = mul(n, y);
    return _mm256_fmadd_ps(p, set(0.99999f), _mm256_fmadd_ps(_mm256_fnmadd_ps(d, q, n), y, q));
  }
};

template <class Kind>
DS_AVX2 __attribute__((noinline)) void sweep(float* p, float* m, float* v, const float* g,
                                             std::size_t numel) {
  for (std::size_t i = 0; i < numel; i += 8) {
    Moments s{_mm256_loadu_ps(m + i), _mm256_loadu_ps(v + i)};
    _mm256_storeu_ps(p + i, Kind::step(_mm256_loadu_ps(p + i), _mm256_loadu_ps(g + i), s));
    _mm256_storeu_ps(m + i, s.m);
    _mm256_storeu_ps(v + i, s.v);
  }
}

template <class Kind>
void report(const char* name) {
  constexpr std::size_t kNumel = 8192;         // 128 KiB: the second-level cache
  constexpr std::size_t kRoom = kNumel + 208;  // not a multiple of 4 KiB apart: a load would wait for a store
  alignas(64) static float p[kRoom], m[kRoom], v[kRoom], g[kRoom];
  double best = 1e9;
  for (int round = 0; round < 300; ++round) {
    for (std::size_t i = 0; i < kNumel; ++i) {  // ordinary numbers again: no denormals, no infinities
      m[i] = g[i] = 0.001f * static_cast<float>(i % 997 + 1);
      v[i] = 0.3f + g[i] * g[i];
      p[i] = 1.0f;
    }
    const auto start = std::chrono::steady_clock::now();
    for (int k = 0; k < 20; ++k) sweep<Kind>(p, m, v, g, kNumel);
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count() / (20.0 * kNumel));
  }
  std::printf("%-16s %.3f\n", name, best);
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::printf("this CPU has no AVX2 and FMA\n");
    return 1;
  }
  report<Nothing>("nothing");
  report<Root>("square root");
  report<Division>("division");
  report<Both>("both");
  report<Adam>("adam");
  report<Fused>("adam with FMA");
  report<Newton>("adam, Newton");
}
#else
int main() {
  std::printf("written for x86-64\n");
  return 1;
}
#endif
