// Runs kernels of src/cuda on the CPU, to test what they compute on machines without a GPU: what runtime.h
// and the compiler for GPUs offer, with a thread of the operating system for each thread of a warp. Kernels
// may exchange values within a warp only, and either all threads of a warp leave early or none.
#pragma once

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#define DS_INLINE inline
#define __global__
#define __launch_bounds__(threads)
#define DS_SHUFFLE_DOWN(value, distance, width) \
  ds::emulated::shuffled(value, ds::emulated::down(distance, width))
#define DS_SHUFFLE(value, lane, width) ds::emulated::shuffled(value, lane)
#define DS_BALLOT(predicate) ds::emulated::ballot(predicate)

namespace ds::emulated {

inline constexpr int kLanesOfWarp = 32;

struct Index {
  unsigned x;
};

struct Warp {
  std::barrier<> all{kLanesOfWarp};
  std::uint64_t values[kLanesOfWarp] = {};
};

inline thread_local Warp* t_warp = nullptr;
inline thread_local int t_lane = 0;

// As __shfl_down: the own value where the distance leads out of the part of `width` threads.
inline int down(int distance, int width) {
  return t_lane % width + distance < width ? t_lane + distance : t_lane;
}

inline std::uint64_t exchanged(std::uint64_t value, int from) {
  t_warp->values[t_lane] = value;
  t_warp->all.arrive_and_wait();
  const std::uint64_t got = t_warp->values[from];
  t_warp->all.arrive_and_wait();
  return got;
}

inline double shuffled(double value, int from) {
  return std::bit_cast<double>(exchanged(std::bit_cast<std::uint64_t>(value), from));
}
inline float shuffled(float value, int from) {
  return std::bit_cast<float>(
      static_cast<std::uint32_t>(exchanged(std::bit_cast<std::uint32_t>(value), from)));
}
inline unsigned shuffled(unsigned value, int from) { return static_cast<unsigned>(exchanged(value, from)); }
inline int shuffled(int value, int from) {
  return static_cast<int>(exchanged(static_cast<std::uint64_t>(value), from));
}

inline unsigned ballot(bool predicate) {
  t_warp->values[t_lane] = predicate ? 1 : 0;
  t_warp->all.arrive_and_wait();
  unsigned mask = 0;
  for (int lane = 0; lane < kLanesOfWarp; ++lane) mask |= static_cast<unsigned>(t_warp->values[lane]) << lane;
  t_warp->all.arrive_and_wait();
  return mask;
}

}  // namespace ds::emulated

inline thread_local ds::emulated::Index threadIdx{0}, blockIdx{0};

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __double2float_rn(double a) { return static_cast<float>(a); }
using std::fabs;
using std::max;

namespace ds::emulated {

// Calls kernel() as every thread of `grid` blocks of `threads` threads, one warp after the other.
template <class Kernel>
void launch(unsigned grid, unsigned threads, Kernel kernel) {
  Warp warp;
  std::vector<std::thread> lanes;
  for (int lane = 0; lane < kLanesOfWarp; ++lane) {
    lanes.emplace_back([&, lane] {
      t_warp = &warp;
      t_lane = lane;
      for (unsigned block = 0; block < grid; ++block) {
        for (unsigned first = 0; first < threads; first += kLanesOfWarp) {
          blockIdx.x = block;
          threadIdx.x = first + static_cast<unsigned>(lane);
          kernel();
          warp.all.arrive_and_wait();
        }
      }
    });
  }
  for (std::thread& lane : lanes) lane.join();
}

}  // namespace ds::emulated
