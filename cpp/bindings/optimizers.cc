// Adam, Adagrad, Lion and SGD.
#include <optional>

#include "ds/adagrad.h"
#include "ds/adam.h"
#include "ds/lion.h"
#include "ds/sgd.h"
#include "gpu.h"
#include "tensor.h"

namespace ds::bindings {
namespace {

void require_step(std::string_view function, std::int64_t step) {
  if (step >= 1) return;
  throw py::value_error(std::string(function) + ": step counts from 1, but is " + std::to_string(step));
}

// What the optimizers have in common: lists of tensors in, one call, without the GIL.
struct Lists {
  std::string_view function;
  py::handle params;
  std::initializer_list<StateArg> states;
  py::handle grads;
  py::handle outs;
  py::handle checksums;
  py::handle formats;
};

template <class Scalars, class Options>
void run(const Lists& lists, const Options& options, int threads,
         void (*on_cpu)(const Options&, std::span<const UpdateTensor>, int, std::span<const UpdateSums>,
                        std::span<const TensorFormat>, const RoundingKeys&),
         int (*GpuLibrary::*on_gpu)(int, const Scalars*, const UpdateTensor*, std::int64_t, void*)) {
  TensorReader reader(lists.function);
  StepFormats formats(lists.formats);
  const std::vector<UpdateTensor> tensors =
      read_updates(reader, lists.function, lists.params, lists.states, lists.grads, lists.outs,
                   lists.formats.is_none() ? nullptr : &formats);
  if (!reader.on_gpu()) {
    const std::vector<UpdateSums> sums =
        read_sums(reader, lists.function, lists.checksums, tensors, formats.tensors);
    py::gil_scoped_release unlocked;
    on_cpu(options, tensors, threads, sums, formats.tensors, formats.keys);
    return;
  }
  if (!formats.tensors.empty()) {
    throw py::value_error(std::string(lists.function) +
                          ": master_bits, stochastic rounding and 8-bit states work on the CPU only");
  }
  if (!lists.checksums.is_none()) {
    throw py::value_error(std::string(lists.function) + ": checksums are computed on the CPU only");
  }
  void* stream = reader.stream();
  const Scalars scalars(options);
  gpu_check(lists.function.data(), (gpu()->*on_gpu)(reader.device_index(), &scalars, tensors.data(),
                                                    static_cast<std::int64_t>(tensors.size()), stream));
}

void adam(py::handle params, py::handle exp_avgs, py::handle exp_avg_sqs, py::handle grads, py::handle out,
          std::int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay,
          bool decoupled, double grad_scale, int threads, py::handle checksums, py::handle formats) {
  require_step("adam_step", step);
  const AdamOptions options{step, lr, beta1, beta2, eps, weight_decay, decoupled, grad_scale};
  run<AdamScalars>({"adam_step",
                    params,
                    {{"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}},
                    grads,
                    out,
                    checksums,
                    formats},
                   options, threads, adam_step, &GpuLibrary::adam);
}

void adagrad(py::handle params, py::handle sums, py::handle grads, py::handle out, std::int64_t step,
             double lr, double lr_decay, double eps, double weight_decay, double grad_scale, int threads,
             py::handle checksums, py::handle formats) {
  require_step("adagrad_step", step);
  const AdagradOptions options{step, lr, lr_decay, eps, weight_decay, grad_scale};
  run<AdagradScalars>({"adagrad_step", params, {{"sums", sums}}, grads, out, checksums, formats}, options,
                      threads, adagrad_step, &GpuLibrary::adagrad);
}

void lion(py::handle params, py::handle exp_avgs, py::handle grads, py::handle out, double lr, double beta1,
          double beta2, double weight_decay, double grad_scale, int threads, py::handle checksums,
          py::handle formats) {
  const LionOptions options{lr, beta1, beta2, weight_decay, grad_scale};
  run<LionScalars>({"lion_step", params, {{"exp_avgs", exp_avgs}}, grads, out, checksums, formats}, options,
                   threads, lion_step, &GpuLibrary::lion);
}

void sgd(py::handle params, py::handle buffers, py::handle grads, py::handle out, bool first, double lr,
         double momentum, double dampening, double weight_decay, bool nesterov, double grad_scale,
         int threads, py::handle checksums, py::handle formats) {
  const SgdOptions options{first, lr, momentum, dampening, weight_decay, nesterov, grad_scale};
  if (momentum == 0.0) {
    run<SgdScalars>({"sgd_step", params, {}, grads, out, checksums, formats}, options, threads, sgd_step,
                    &GpuLibrary::sgd);
  } else {
    run<SgdScalars>({"sgd_step", params, {{"momentum_buffers", buffers}}, grads, out, checksums, formats},
                    options, threads, sgd_step, &GpuLibrary::sgd);
  }
}

// The counters of updates: fp32 CPU tensors of one element; nothing where one of them is not.
std::optional<std::vector<float*>> counters(py::handle list) {
  TensorReader reader("counters");
  const Items items(list, "counters", "counts");
  std::vector<float*> values;
  values.reserve(items.size());
  try {
    for (std::size_t i = 0; i < items.size(); ++i) {
      const View view = reader.floats(items[i], "counts", kFloat32);
      if (view.numel != 1 || reader.on_gpu()) return std::nullopt;
      values.push_back(static_cast<float*>(view.data));
    }
  } catch (const py::value_error&) {
    return std::nullopt;
  }
  return values;
}

py::object read_counts(py::handle list) {
  const std::optional<std::vector<float*>> values = counters(list);
  if (!values) return py::none();
  py::list numbers;
  for (const float* value : *values) numbers.append(static_cast<std::int64_t>(*value));
  return numbers;
}

bool advance_counts(py::handle list) {
  const std::optional<std::vector<float*>> values = counters(list);
  if (!values) return false;
  for (float* value : *values) *value += 1.0f;
  return true;
}

}  // namespace

void bind_optimizers(py::module_& m) {
  m.def("adam_step", &adam);
  m.def("adagrad_step", &adagrad);
  m.def("lion_step", &lion);
  m.def("sgd_step", &sgd);
  m.def("read_counts", &read_counts);
  m.def("advance_counts", &advance_counts);
}

}  // namespace ds::bindings
