// The Python module ds_core._core. Arguments are positional; ds_core.kernels is the public face.
#include "ds/cpu_target.h"
#include "ds/parallel.h"
#include "gpu.h"
#include "tensor.h"

PYBIND11_MODULE(_core, m) {
  namespace py = pybind11;
  m.attr("version") = DS_VERSION;
  m.def("cpu_target", [] { return std::string(ds::name(ds::cpu_target())); });
  m.def("available_cpu_targets", [] {
    py::list names;
    for (const ds::CpuTarget target : ds::available_cpu_targets())
      names.append(std::string(ds::name(target)));
    return names;
  });
  m.def("set_cpu_target", [](const std::string& name) { ds::set_cpu_target(name); });
  m.def("compute_on", &ds::compute_on);
  m.def("thread_source", [] { return std::string(ds::thread_source()); });
  m.def("gpu_open", &ds::bindings::gpu_open);
  m.def("gpu_num_devices",
        [] { return ds::bindings::gpu() == nullptr ? 0 : ds::bindings::gpu()->num_devices(); });
  ds::bindings::bind_optimizers(m);
  ds::bindings::bind_lamb(m);
  ds::bindings::bind_reductions(m);
  ds::bindings::bind_attention(m);
  ds::bindings::bind_experts(m);
  ds::bindings::bind_signs(m);
  ds::bindings::bind_codes(m);
  ds::bindings::bind_memory(m);
  ds::bindings::bind_io(m);
  ds::bindings::bind_same_host(m);
}
