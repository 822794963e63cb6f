#include "ds/row_sums.h"

#include <algorithm>

#include "cpu/row_sums.h"
#include "dispatch/kernel_table.h"
#include "ds/parallel.h"

namespace ds {
namespace {

constexpr std::int64_t kSumsAtOnce = 64;

template <class Each>
void for_each_sum(const RowSums& job, int num_threads, Each each) {
  parallel_for((job.sums + kSumsAtOnce - 1) / kSumsAtOnce, num_threads, [&](std::int64_t chunk) {
    const std::int64_t begin = chunk * kSumsAtOnce, end = std::min(begin + kSumsAtOnce, job.sums);
    for (std::int64_t s = begin; s < end; ++s) each(s);
  });
}

}  // namespace

void row_sums(const RowSums& job, const void* rows, const void* weights, void* out, int num_threads) {
  const auto kernel = kernels().row_sum[state_kind(job.dtype)];
  for_each_sum(job, num_threads, [&](std::int64_t s) { kernel(job, rows, weights, s, out); });
}

void row_sums_grad(const RowSums& job, const void* grad, const void* rows, const void* weights, void* drows,
                   void* dweights, int num_threads) {
  const auto kernel = kernels().row_sum_grad[state_kind(job.dtype)];
  const RowSumGrads all{grad, rows, weights, drows, dweights};
  for_each_sum(job, num_threads, [&](std::int64_t s) { kernel(job, all, s); });
}

}  // namespace ds
