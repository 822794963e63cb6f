// Adam, Adagrad, Lion and SGD: element-wise, the same formulas as on the CPU.
#include "cuda/runtime.h"
#include "ds/gpu.h"

namespace ds {
namespace {
#include "cuda/simd_gpu.h"
// Formulas in those terms.
#include "formulas/adagrad-inl.h"
#include "formulas/adam-inl.h"
#include "formulas/lion-inl.h"
#include "formulas/sgd-inl.h"
// Launching.
#include "cuda/multi_tensor.h"

constexpr std::int64_t kUnit = 16 * kThreads;  // elements per block

DS_INLINE F32 update_one(const AdamScalars& scalars, const UpdateTensor& t, std::int64_t i) {
  F32 m = load(t.states[0], t.state_dtype, i);
  F32 v = load(t.states[1], t.state_dtype, i);
  const F32 p = adam_update(adam_factors(scalars), {t.param[i]}, m, v, load(t.grad, t.grad_dtype, i));
  store(t.states[0], t.state_dtype, i, m);
  store(t.states[1], t.state_dtype, i, v);
  return p;
}

template <class Scalars>
DS_INLINE F32 update_one(const Scalars& scalars, const UpdateTensor& t, std::int64_t i) {
  const bool has_state = t.states[0] != nullptr;
  F32 s = has_state ? load(t.states[0], t.state_dtype, i) : set(0.0f);
  const F32 p = update(factors_of(scalars), {t.param[i]}, s, load(t.grad, t.grad_dtype, i));
  if (has_state) store(t.states[0], t.state_dtype, i, s);
  return p;
}

template <class Scalars>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const Table<UpdateTensor> table, const Scalars scalars) {
  const int owner = table.owner(blockIdx.x);
  const UpdateTensor& t = table.tensors[owner];
  const std::int64_t begin = (blockIdx.x - table.first[owner]) * kUnit;
  const std::int64_t end = min(t.numel, begin + kUnit);
#pragma unroll 4
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const F32 p = update_one(scalars, t, i);
    t.param[i] = p.raw;
    if (t.out != nullptr) store(t.out, t.out_dtype, i, p);
  }
}

template <class Scalars>
int launch_update(int device, const Scalars* scalars, const UpdateTensor* tensors, std::int64_t count,
                  void* stream) {
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return for_each_table(tensors, count, kUnit, [&](const Table<UpdateTensor>& table, std::int64_t units) {
    update_kernel<<<static_cast<unsigned>(units), kThreads, 0, static_cast<GpuStream>(stream)>>>(table,
                                                                                                 *scalars);
  });
}

}  // namespace
}  // namespace ds

int ds_gpu_adam(int device, const ds::AdamScalars* s, const ds::UpdateTensor* t, std::int64_t count,
                void* stream) {
  return ds::launch_update(device, s, t, count, stream);
}
int ds_gpu_adagrad(int device, const ds::AdagradScalars* s, const ds::UpdateTensor* t, std::int64_t count,
                   void* stream) {
  return ds::launch_update(device, s, t, count, stream);
}
int ds_gpu_lion(int device, const ds::LionScalars* s, const ds::UpdateTensor* t, std::int64_t count,
                void* stream) {
  return ds::launch_update(device, s, t, count, stream);
}
int ds_gpu_sgd(int device, const ds::SgdScalars* s, const ds::UpdateTensor* t, std::int64_t count,
               void* stream) {
  return ds::launch_update(device, s, t, count, stream);
}
