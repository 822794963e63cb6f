// LAMB: the first pass sums as the norm kernel does, the second is element-wise.
#include "cuda/runtime.h"
#include "ds/gpu.h"

namespace ds {
namespace {
#include "cuda/simd_gpu.h"
// The formula in those terms.
#include "formulas/lamb-inl.h"
// Launching.
#include "cuda/multi_tensor.h"
// Sums over it.
#include "cuda/fixed_sums.h"

constexpr std::int64_t kUnit = 16 * kThreads;

__global__ void __launch_bounds__(kThreads)
    moments_kernel(const Table<UpdateTensor> table, const LambScalars scalars, LambNorms* block_sums) {
  const SumLane at = sum_lane();
  const bool used = at.unit < table.first[table.count];
  double param_sum = 0.0;
  double direction_sum = 0.0;
  if (used) {
    const LambFactors k = lamb_factors(scalars);
    const int owner = table.owner(at.unit);
    const UpdateTensor& t = table.tensors[owner];
    const std::int64_t begin = (at.unit - table.first[owner]) * kNormBlock;
    const std::int64_t end = min(t.numel, begin + kNormBlock);
    for (std::int64_t i = begin + at.lane; i < end; i += kSumLanes) {
      F32 m = load(t.states[0], t.state_dtype, i);
      F32 v = load(t.states[1], t.state_dtype, i);
      lamb_moments(k, m, v, load(t.grad, t.grad_dtype, i));
      store(t.states[0], t.state_dtype, i, m);
      store(t.states[1], t.state_dtype, i, v);
      // As the second pass will read them back.
      const F32 p = {t.param[i]};
      const F32 u =
          lamb_direction(k, p, load(t.states[0], t.state_dtype, i), load(t.states[1], t.state_dtype, i));
      param_sum = __dadd_rn(param_sum, __dmul_rn(p.raw, p.raw));
      direction_sum = __dadd_rn(direction_sum, __dmul_rn(u.raw, u.raw));
    }
  }
  param_sum = tree_sum(param_sum);
  direction_sum = tree_sum(direction_sum);
  if (used && at.lane == 0) block_sums[table.base + at.unit] = {param_sum, direction_sum};
}

struct Step {
  float minus[kTableSize];
};

__global__ void __launch_bounds__(kThreads)
    apply_kernel(const Table<UpdateTensor> table, const LambScalars scalars, const Step step) {
  const int owner = table.owner(blockIdx.x);
  const UpdateTensor& t = table.tensors[owner];
  const LambFactors k = lamb_factors(scalars);
  const std::int64_t begin = (blockIdx.x - table.first[owner]) * kUnit;
  const std::int64_t end = min(t.numel, begin + kUnit);
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const F32 p = {t.param[i]};
    const F32 u =
        lamb_direction(k, p, load(t.states[0], t.state_dtype, i), load(t.states[1], t.state_dtype, i));
    const F32 now = p + set(step.minus[owner]) * u;
    t.param[i] = now.raw;
    if (t.out != nullptr) store(t.out, t.out_dtype, i, now);
  }
}

}  // namespace
}  // namespace ds

int ds_gpu_lamb_moments(int device, const ds::LambScalars* scalars, const ds::UpdateTensor* tensors,
                        std::int64_t count, ds::LambNorms* block_sums, void* stream) {
  using namespace ds;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return for_each_table(tensors, count, kNormBlock,
                        [&](const Table<UpdateTensor>& table, std::int64_t units) {
                          moments_kernel<<<sum_grid(units), kThreads, 0, static_cast<GpuStream>(stream)>>>(
                              table, *scalars, block_sums);
                        });
}

int ds_gpu_lamb_apply(int device, const ds::LambScalars* scalars, const ds::UpdateTensor* tensors,
                      std::int64_t count, const float* minus_steps, void* stream) {
  using namespace ds;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  std::int64_t next = 0;  // of the tensors, the first that no table held; empty ones are in none
  return for_each_table(tensors, count, kUnit, [&](const Table<UpdateTensor>& table, std::int64_t units) {
    Step step{};
    for (int i = 0; i < table.count; ++next) {
      if (tensors[next].numel != 0) step.minus[i++] = minus_steps[next];
    }
    apply_kernel<<<static_cast<unsigned>(units), kThreads, 0, static_cast<GpuStream>(stream)>>>(
        table, *scalars, step);
  });
}
