// What the library says about itself.
#include "ds/gpu.h"
#include "cuda/runtime.h"

int ds_gpu_abi() { return DS_GPU_ABI; }

const char* ds_gpu_message(int status) { return DS_GPU(GetErrorString)(static_cast<DS_GPU(Error_t)>(status)); }

int ds_gpu_num_devices() {
  int count = 0;
  return DS_GPU(GetDeviceCount)(&count) == 0 ? count : 0;
}
