// The GPU library, opened at run time.
#pragma once

#include <string>

#include "dlpack.h"
#include "ds/gpu.h"

namespace ds::bindings {

struct GpuLibrary {
  decltype(&ds_gpu_message) message;
  decltype(&ds_gpu_num_devices) num_devices;
  decltype(&ds_gpu_host_register) host_register;
  decltype(&ds_gpu_host_unregister) host_unregister;
#define DS_MEMBER(name, ...) decltype(&ds_gpu_##name) name;
  DS_GPU_FUNCTIONS(DS_MEMBER)
#undef DS_MEMBER
};

// Throws std::runtime_error with the reason when the file cannot be loaded or has another ABI number.
void gpu_open(const std::string& path);

// The opened library, or null.
const GpuLibrary* gpu();

// Raises RuntimeError for a status other than 0.
void gpu_check(const char* function, int status);

}  // namespace ds::bindings
