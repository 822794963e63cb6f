// Sums of rows that are chosen by index (ds/row_sums.h).
#include "cuda/runtime.h"
#include "ds/gpu.h"

namespace ds {
namespace {
#include "cuda/simd_gpu.h"
// The number of threads.
#include "cuda/multi_tensor.h"
// The kernels.
#include "cuda/row_sums-inl.h"
}  // namespace
}  // namespace ds

int ds_gpu_row_sums(int device, const ds::RowSums* job, const void* rows, const void* weights, void* out,
                    void* stream) {
  using namespace ds;
  if (job->sums == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  row_sums_kernel<<<static_cast<unsigned>(job->sums), kThreads, 0, static_cast<GpuStream>(stream)>>>(
      *job, rows, weights, out);
  return static_cast<int>(DS_GPU(GetLastError)());
}

int ds_gpu_row_sums_grad(int device, const ds::RowSums* job, const void* grad, const void* rows,
                         const void* weights, void* drows, void* dweights, void* stream) {
  using namespace ds;
  const std::int64_t threads = job->sums * job->choices * kRowLanes;
  if (threads == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  const auto grid = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  row_sums_grad_kernel<<<grid, kThreads, 0, static_cast<GpuStream>(stream)>>>(*job, grad, rows, weights,
                                                                              drows, dweights);
  return static_cast<int>(DS_GPU(GetLastError)());
}
