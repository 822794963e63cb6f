// Sums in the order of the CPU kernels ([Note: sums in fixed order] in cpu/norm-inl.h): 16 consecutive
// threads have the 16 accumulators of a block of elements. Included inside an anonymous namespace, after
// multi_tensor.h.

constexpr int kSumLanes = 16;

// The block of elements and the lane of this thread; blocks are the units of a Table.
struct SumLane {
  std::int64_t unit;
  int lane;
};

DS_INLINE SumLane sum_lane() {
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  return {thread / kSumLanes, static_cast<int>(thread % kSumLanes)};
}

// Adds the 16 lanes as a binary tree; lane 0 gets the result. Every thread of the warp must call it.
DS_INLINE double tree_sum(double sum) {
#pragma unroll
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    sum = __dadd_rn(sum, DS_SHUFFLE_DOWN(sum, half, kSumLanes));
  return sum;
}

inline unsigned sum_grid(std::int64_t units) {
  return static_cast<unsigned>((units * kSumLanes + kThreads - 1) / kThreads);
}
