#include "gpu.h"

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>

namespace ds::bindings {
namespace {

std::atomic<const GpuLibrary*> g_library{nullptr};

template <class F>
void bind(void* library, const char* symbol, F& function) {
  function = reinterpret_cast<F>(dlsym(library, symbol));
  if (function == nullptr) throw std::runtime_error(std::string("the GPU library lacks ") + symbol);
}

}  // namespace

void gpu_open(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  decltype(&ds_gpu_abi) abi;
  bind(handle, "ds_gpu_abi", abi);
  if (abi() != DS_GPU_ABI) {
    throw std::runtime_error("its ABI is number " + std::to_string(abi()) + ", but ds_core needs " +
                             std::to_string(DS_GPU_ABI) + "; install matching versions");
  }
  auto* library = new GpuLibrary;  // lives as long as the process: kernels may be in flight at its end
  bind(handle, "ds_gpu_message", library->message);
  bind(handle, "ds_gpu_num_devices", library->num_devices);
  bind(handle, "ds_gpu_host_register", library->host_register);
  bind(handle, "ds_gpu_host_unregister", library->host_unregister);
#define DS_BIND(name, ...) bind(handle, "ds_gpu_" #name, library->name);
  DS_GPU_FUNCTIONS(DS_BIND)
#undef DS_BIND
  g_library.store(library, std::memory_order_release);
}

const GpuLibrary* gpu() { return g_library.load(std::memory_order_acquire); }

void gpu_check(const char* function, int status) {
  if (status == 0) return;
  throw std::runtime_error(std::string(function) + ": " + gpu()->message(status));
}

}  // namespace ds::bindings
