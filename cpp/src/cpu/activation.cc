#include "ds/activation.h"

#include <algorithm>

#include "cpu/activation.h"
#include "dispatch/kernel_table.h"
#include "ds/parallel.h"

namespace ds {
namespace {

constexpr std::int64_t kAtOnce = 4096;

template <class Range>
void for_each_range(std::int64_t numel, int num_threads, Range range) {
  parallel_for((numel + kAtOnce - 1) / kAtOnce, num_threads,
               [&](std::int64_t chunk) { range(chunk * kAtOnce, std::min((chunk + 1) * kAtOnce, numel)); });
}

}  // namespace

void activation(const ActivationJob& job, const void* x, const void* factor, void* out, int num_threads) {
  const auto kernel = kernels().activation[static_cast<int>(job.function)][state_kind(job.dtype)];
  for_each_range(job.numel, num_threads,
                 [&](std::int64_t begin, std::int64_t end) { kernel(x, factor, out, begin, end); });
}

void activation_grad(const ActivationJob& job, const void* grad, const void* x, const void* factor, void* dx,
                     void* dfactor, void* out, int num_threads) {
  const auto kernel = kernels().activation_grad[static_cast<int>(job.function)][state_kind(job.dtype)];
  const ActivationGrads all{grad, x, factor, dx, dfactor, out};
  for_each_range(job.numel, num_threads,
                 [&](std::int64_t begin, std::int64_t end) { kernel(all, begin, end); });
}

}  // namespace ds
