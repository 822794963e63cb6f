// Codes of 1, 4 and 8 bits (ds/codes.h).
#include "cuda/runtime.h"
#include "ds/gpu.h"

namespace ds {
namespace {
#include "cuda/simd_gpu.h"
// The number of threads.
#include "cuda/multi_tensor.h"
// Sums.
#include "cuda/fixed_sums.h"
// The kernels.
#include "cuda/codes-inl.h"

// Calls launch(grid, stream) on the device, if there is anything to do.
template <class Launch>
int with_grid(int device, std::int64_t count, void* stream, Launch launch) {
  if (count == 0) return 0;
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  launch(static_cast<unsigned>((count * kWarp + kThreads - 1) / kThreads), static_cast<GpuStream>(stream));
  return static_cast<int>(DS_GPU(GetLastError)());
}

}  // namespace
}  // namespace ds

int ds_gpu_sign_encode(int device, const ds::CodeBlock* blocks, std::int64_t count,
                       const ds::CodeSource* source, float* scales, std::uint8_t* codes, void* stream) {
  using namespace ds;
  return with_grid(device, count, stream, [&](unsigned grid, GpuStream on) {
    sign_encode_kernel<<<grid, kThreads, 0, on>>>(blocks, count, *source, scales, codes);
  });
}

int ds_gpu_sign_decode(int device, const ds::CodeBlock* blocks, std::int64_t count, const float* scales,
                       const std::uint8_t* codes, const ds::CodeTarget* target, void* stream) {
  using namespace ds;
  return with_grid(device, count, stream, [&](unsigned grid, GpuStream on) {
    sign_decode_kernel<<<grid, kThreads, 0, on>>>(blocks, count, scales, codes, *target);
  });
}

int ds_gpu_int_encode(int device, const ds::CodeBlock* blocks, std::int64_t count,
                      const ds::CodeSource* source, int bits, const ds::Rounding* rounding, float* scales,
                      std::uint8_t* codes, void* stream) {
  using namespace ds;
  return with_grid(device, count, stream, [&](unsigned grid, GpuStream on) {
    auto* const kernel = bits == 8 ? int_encode_kernel<8> : int_encode_kernel<4>;
    kernel<<<grid, kThreads, 0, on>>>(blocks, count, *source, *rounding, scales, codes);
  });
}

int ds_gpu_int_decode(int device, const ds::CodeBlock* blocks, std::int64_t count, const float* scales,
                      const std::uint8_t* codes, int bits, const ds::CodeTarget* target, void* stream) {
  using namespace ds;
  return with_grid(device, count, stream, [&](unsigned grid, GpuStream on) {
    auto* const kernel = bits == 8 ? int_decode_kernel<8> : int_decode_kernel<4>;
    kernel<<<grid, kThreads, 0, on>>>(blocks, count, scales, codes, *target);
  });
}
