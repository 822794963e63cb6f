// What the library says about itself.
#include "cuda/runtime.h"
#include "ds/gpu.h"

int ds_gpu_abi() { return DS_GPU_ABI; }

const char* ds_gpu_message(int status) {
  return DS_GPU(GetErrorString)(static_cast<DS_GPU(Error_t)>(status));
}

int ds_gpu_num_devices() {
  int count = 0;
  return DS_GPU(GetDeviceCount)(&count) == 0 ? count : 0;
}

int ds_gpu_host_register(void* pages, std::uint64_t size) {
  return static_cast<int>(DS_GPU(HostRegister)(pages, size, DS_GPU(HostRegisterPortable)));
}

int ds_gpu_host_unregister(void* pages) { return static_cast<int>(DS_GPU(HostUnregister)(pages)); }
