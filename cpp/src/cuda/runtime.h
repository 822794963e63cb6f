// The few names of the CUDA runtime that are used here, for CUDA and for HIP.
#pragma once

#include <cstdint>

#if defined(__HIPCC__)
#include <hip/hip_runtime.h>
using GpuStream = hipStream_t;
#define DS_GPU(name) hip##name
#define DS_SHUFFLE_DOWN(value, distance, width) __shfl_down(value, distance, width)
#define DS_SHUFFLE(value, lane, width) __shfl(value, lane, width)
// Of 32 consecutive threads, where a wavefront has 64, too.
#define DS_BALLOT(predicate) \
  static_cast<unsigned>(__ballot(predicate) >> (threadIdx.x & 32u & (warpSize - 1u)))
#else
#include <cuda_runtime.h>
using GpuStream = cudaStream_t;
#define DS_GPU(name) cuda##name
#define DS_SHUFFLE_DOWN(value, distance, width) __shfl_down_sync(0xffffffffu, value, distance, width)
#define DS_SHUFFLE(value, lane, width) __shfl_sync(0xffffffffu, value, lane, width)
#define DS_BALLOT(predicate) __ballot_sync(0xffffffffu, predicate)
#endif

#define DS_INLINE __device__ __forceinline__

namespace ds {

// Makes a device current, and the one before at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = DS_GPU(GetDevice)(&before_);
    if (status_ == 0 && before_ != device) status_ = DS_GPU(SetDevice)(device);
    changed_ = status_ == 0 && before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) (void)DS_GPU(SetDevice)(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int status() const { return static_cast<int>(status_); }

 private:
  DS_GPU(Error_t) status_;
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace ds
