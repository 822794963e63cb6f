// Sums of squares, casts, and signs.
#include "cuda/runtime.h"
#include "ds/gpu.h"

namespace ds {
namespace {
#include "cuda/simd_gpu.h"
// Launching.
#include "cuda/multi_tensor.h"
// Sums over it.
#include "cuda/fixed_sums.h"

constexpr std::int64_t kUnit = 16 * kThreads;

struct Square {
  DS_INLINE double operator()(double x) const { return __dmul_rn(x, x); }
};
struct Magnitude {
  DS_INLINE double operator()(double x) const { return fabs(x); }
};

template <class Term>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const Table<NormTensor> table, std::int64_t block_numel, Term term, double* block_sums) {
  const SumLane at = sum_lane();
  const bool used = at.unit < table.first[table.count];
  double sum = 0.0;
  if (used) {
    const int owner = table.owner(at.unit);
    const NormTensor& t = table.tensors[owner];
    const std::int64_t begin = (at.unit - table.first[owner]) * block_numel;
    const std::int64_t end = min(t.numel, begin + block_numel);
#pragma unroll 8
    for (std::int64_t i = begin + at.lane; i < end; i += kSumLanes) {
      sum = __dadd_rn(sum, term(static_cast<double>(load(t.data, t.dtype, i).raw)));
    }
  }
  sum = tree_sum(sum);
  if (used && at.lane == 0) block_sums[table.base + at.unit] = sum;
}

template <class Term>
int launch_sums(int device, const NormTensor* tensors, std::int64_t count, std::int64_t block_numel,
                Term term, double* block_sums, void* stream) {
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return for_each_table(tensors, count, block_numel, [&](const Table<NormTensor>& table, std::int64_t units) {
    sum_kernel<<<sum_grid(units), kThreads, 0, static_cast<GpuStream>(stream)>>>(table, block_numel, term,
                                                                                 block_sums);
  });
}

__global__ void __launch_bounds__(kThreads) cast_kernel(const Table<CastTensor> table) {
  const int owner = table.owner(blockIdx.x);
  const CastTensor& t = table.tensors[owner];
  const std::int64_t begin = (blockIdx.x - table.first[owner]) * kUnit;
  const std::int64_t end = min(t.numel, begin + kUnit);
#pragma unroll 4
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    store(t.dst, t.dst_dtype, i, load(t.src, t.src_dtype, i));
  }
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const NormTensor x, std::uint8_t* bits) {
  const std::int64_t byte = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (byte * 8 >= x.numel) return;
  unsigned packed = 0;
  for (int bit = 0; bit < 8 && byte * 8 + bit < x.numel; ++bit) {
    packed |= (bits_of(load(x.data, x.dtype, byte * 8 + bit).raw) >> 31) << bit;
  }
  bits[byte] = static_cast<std::uint8_t>(packed);
}

__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const std::uint8_t* bits, const float scale, const CastTensor to) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= to.numel) return;
  const bool negative = (bits[i / 8] >> (i % 8) & 1) != 0;
  store(to.dst, to.dst_dtype, i, {negative ? -scale : scale});
}

unsigned grid(std::int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace
}  // namespace ds

int ds_gpu_squared_norm_blocks(int device, const ds::NormTensor* tensors, std::int64_t count,
                               std::int64_t block_numel, double* block_sums, void* stream) {
  return ds::launch_sums(device, tensors, count, block_numel, ds::Square{}, block_sums, stream);
}

int ds_gpu_cast(int device, const ds::CastTensor* tensors, std::int64_t count, void* stream) {
  using namespace ds;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return for_each_table(tensors, count, kUnit, [&](const Table<CastTensor>& table, std::int64_t units) {
    cast_kernel<<<static_cast<unsigned>(units), kThreads, 0, static_cast<GpuStream>(stream)>>>(table);
  });
}

int ds_gpu_pack_signs(int device, const ds::NormTensor* x, std::uint8_t* bits, double* block_sums,
                      void* stream) {
  using namespace ds;
  if (x->numel == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  pack_kernel<<<grid((x->numel + 7) / 8), kThreads, 0, static_cast<GpuStream>(stream)>>>(*x, bits);
  if (const auto status = DS_GPU(GetLastError)(); status != 0) return static_cast<int>(status);
  return launch_sums(device, x, 1, kNormBlock, Magnitude{}, block_sums, stream);
}

int ds_gpu_unpack_signs(int device, const std::uint8_t* bits, float scale, const ds::CastTensor* dst,
                        void* stream) {
  using namespace ds;
  if (dst->numel == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  unpack_kernel<<<grid(dst->numel), kThreads, 0, static_cast<GpuStream>(stream)>>>(bits, scale, *dst);
  return static_cast<int>(DS_GPU(GetLastError)());
}
