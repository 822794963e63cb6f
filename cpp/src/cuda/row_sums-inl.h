// The kernels of row_sums.cu. Included inside an anonymous namespace, after simd_gpu.h.

DS_INLINE F32 fused(F32 a, F32 b, F32 c) { return {__fmaf_rn(a.raw, b.raw, c.raw)}; }

constexpr int kAccumulators = 16;
constexpr int kRowLanes = 2 * kAccumulators;

// Each thread computes elements of one sum; blockIdx.x is the sum.
__global__ void __launch_bounds__(kThreads)
    row_sums_kernel(const RowSums job, const void* rows, const void* weights, void* out) {
  const auto s = static_cast<std::int64_t>(blockIdx.x);
  const std::int64_t* index = job.index + s * job.choices;
  for (std::int64_t j = threadIdx.x; j < job.columns; j += kThreads) {
    F32 sum = {0.0f};
    for (std::int64_t k = 0; k < job.choices; ++k) {
      if (index[k] == job.num_rows) continue;
      const F32 row = load(rows, job.dtype, index[k] * job.columns + j);
      sum = weights == nullptr ? sum + row : fused(load(weights, job.dtype, s * job.choices + k), row, sum);
    }
    store(out, job.dtype, s * job.columns + j, sum);
  }
}

// 32 consecutive threads compute the gradients of one choice. The lower 16 of them have the accumulators of
// the product: first their own element, then that of the thread 16 above.
__global__ void __launch_bounds__(kThreads)
    row_sums_grad_kernel(const RowSums job, const void* grad, const void* rows, const void* weights,
                         void* drows, void* dweights) {
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t choice = thread / kRowLanes;
  const int lane = static_cast<int>(thread % kRowLanes);
  if (choice >= job.sums * job.choices) return;  // all threads of the warp
  const std::int64_t row = job.index[choice];
  if (row == job.num_rows) {
    if (lane == 0) store(dweights, job.dtype, choice, {0.0f});
    return;
  }
  const F32 weight = load(weights, job.dtype, choice);
  const std::int64_t from = choice / job.choices * job.columns, at = row * job.columns;
  F32 sum = {0.0f};
  for (std::int64_t first = 0; first < job.columns; first += kRowLanes) {
    const std::int64_t j = first + lane;
    const bool inside = j < job.columns;  // columns are a multiple of 16: of the upper threads, all or none
    const F32 g = inside ? load(grad, job.dtype, from + j) : F32{0.0f};
    const F32 x = inside ? load(rows, job.dtype, at + j) : F32{0.0f};
    if (inside) store(drows, job.dtype, at + j, weight * g);
    const F32 upper_g = {DS_SHUFFLE_DOWN(g.raw, kAccumulators, kRowLanes)};
    const F32 upper_x = {DS_SHUFFLE_DOWN(x.raw, kAccumulators, kRowLanes)};
    sum = fused(g, x, sum);
    if (first + kAccumulators < job.columns) sum = fused(upper_g, upper_x, sum);
  }
  F32 total = {0.0f};
  for (int i = 0; i < kAccumulators; ++i) total = total + F32{DS_SHUFFLE(sum.raw, i, kRowLanes)};
  if (lane == 0) store(dweights, job.dtype, choice, total);
}
