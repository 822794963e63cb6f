// LAMB: two calls, so that Python can add up norms between them.
#include "ds/lamb.h"

#include <pybind11/stl.h>

#include "ds/norm.h"
#include "gpu.h"
#include "tensor.h"

namespace ds::bindings {
namespace {

LambOptions options_of(const char* function, std::int64_t step, double lr, double beta1, double beta2,
                       double eps, double weight_decay, double grad_scale) {
  if (step < 1)
    throw py::value_error(std::string(function) + ": step counts from 1, but is " + std::to_string(step));
  return {step, lr, beta1, beta2, eps, weight_decay, grad_scale};
}

std::int64_t num_blocks(const std::vector<UpdateTensor>& tensors) {
  std::int64_t blocks = 0;
  for (const UpdateTensor& t : tensors) blocks += (t.numel + kNormBlock - 1) / kNormBlock;
  return blocks;
}

// `sums` is fp64: on the CPU (tensors, 2); on a GPU (blocks, 2), for the caller to add per tensor in order.
void moments(py::handle params, py::handle exp_avgs, py::handle exp_avg_sqs, py::handle grads,
             py::handle sums, std::int64_t step, double beta1, double beta2, double eps, double weight_decay,
             double grad_scale, int threads) {
  const LambOptions options =
      options_of("lamb_moments", step, 0.0, beta1, beta2, eps, weight_decay, grad_scale);
  TensorReader reader("lamb_moments");
  const std::vector<UpdateTensor> tensors =
      read_updates(reader, "lamb_moments", params, {{"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}},
                   grads, py::none());
  const View norms = reader.typed(sums, "sums", dlpack::kFloat, 64, "float64");
  const auto count = static_cast<std::int64_t>(tensors.size());
  reader.require_numel(norms, 2 * (reader.on_gpu() ? num_blocks(tensors) : count), "sums", -1,
                       "params' sums");
  auto* out = static_cast<LambNorms*>(norms.data);
  if (!reader.on_gpu()) {
    py::gil_scoped_release unlocked;
    lamb_moments(options, tensors, out, threads);
    return;
  }
  const LambScalars scalars(options);
  gpu_check("lamb_moments", gpu()->lamb_moments(reader.device_index(), &scalars, tensors.data(), count, out,
                                                reader.stream()));
}

void apply(py::handle params, py::handle exp_avgs, py::handle exp_avg_sqs, py::handle out,
           const std::vector<double>& ratios, std::int64_t step, double lr, double beta1, double beta2,
           double eps, double weight_decay, int threads) {
  const LambOptions options = options_of("lamb_apply", step, lr, beta1, beta2, eps, weight_decay, 1.0);
  TensorReader reader("lamb_apply");
  const std::vector<UpdateTensor> tensors =
      read_updates(reader, "lamb_apply", params, {{"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}},
                   py::handle(), out);
  reader.require_count(ratios.size(), tensors.size(), "ratios", "params");
  std::vector<float> minus_steps;
  for (const double ratio : ratios) minus_steps.push_back(static_cast<float>(-lr * ratio));
  if (!reader.on_gpu()) {
    py::gil_scoped_release unlocked;
    lamb_apply(options, tensors, minus_steps.data(), threads);
    return;
  }
  const LambScalars scalars(options);
  gpu_check("lamb_apply", gpu()->lamb_apply(reader.device_index(), &scalars, tensors.data(),
                                            static_cast<std::int64_t>(tensors.size()), minus_steps.data(),
                                            reader.stream()));
}

}  // namespace

void bind_lamb(py::module_& m) {
  m.def("lamb_moments", &moments);
  m.def("lamb_apply", &apply);
}

}  // namespace ds::bindings
