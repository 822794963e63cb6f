#include "ds/grouped.h"
#include "ds/grouped_feed_forward.h"
#include "ds/row_sums.h"
#include "gpu.h"
#include "tensor.h"

namespace ds::bindings {
namespace {

using Sizes = std::vector<std::int64_t>;

// The arguments of a grouped product, checked: weights (or their gradients) say the number of experts.
class GroupedArgs {
 public:
  GroupedArgs(const char* function, const Sizes& sizes, std::int64_t inputs, std::int64_t outputs)
      : reader_(function) {
    if (inputs < 16 || outputs < 16 || inputs % 16 != 0 || outputs % 16 != 0) {
      throw py::value_error(std::string(function) +
                            ": the numbers of inputs and outputs must be multiples of 16");
    }
    for (const std::int64_t size : sizes) {
      if (size < 0)
        throw py::value_error(std::string(function) + ": an expert has a negative number of rows");
      rows_ += size;
    }
    job_ = {sizes.data(), static_cast<std::int64_t>(sizes.size()), inputs, outputs, DType::kF32};
  }

  void* rows_of(py::handle tensor, const char* name, std::int64_t columns) {
    return read(tensor, name, rows_ * columns, "the sizes");
  }
  void* of_experts(py::handle tensor, const char* name, std::int64_t numel) {
    return tensor.is_none() ? nullptr : read(tensor, name, job_.groups * numel, "the experts");
  }
  const GroupedLinear& job() const { return job_; }
  std::int64_t num_rows() const { return rows_; }

 private:
  void* read(py::handle tensor, const char* name, std::int64_t numel, const char* like) {
    const View view = reader_.floats(tensor, name, first_ ? kStates : only(job_.dtype));
    if (reader_.on_gpu()) throw py::value_error(std::string(name) + ": tensors must be on the CPU");
    reader_.require_numel(view, numel, name, -1, like);
    job_.dtype = view.dtype;
    first_ = false;
    return view.data;
  }

  TensorReader reader_;
  GroupedLinear job_{};
  std::int64_t rows_ = 0;
  bool first_ = true;
};

void forward(py::handle x, py::handle weight, py::handle bias, const Sizes& sizes, std::int64_t inputs,
             std::int64_t outputs, py::handle out, int threads) {
  GroupedArgs args("grouped_linear", sizes, inputs, outputs);
  const void* from = args.rows_of(x, "x", inputs);
  const void* matrices = args.of_experts(weight, "weight", outputs * inputs);
  const void* added = args.of_experts(bias, "bias", outputs);
  void* to = args.rows_of(out, "out", outputs);
  py::gil_scoped_release unlocked;
  grouped_linear(args.job(), from, matrices, added, to, threads);
}

void grad_input(py::handle grad, py::handle weight, const Sizes& sizes, std::int64_t inputs,
                std::int64_t outputs, py::handle dx, int threads) {
  GroupedArgs args("grouped_linear_grad_input", sizes, inputs, outputs);
  const void* from = args.rows_of(grad, "grad", outputs);
  const void* matrices = args.of_experts(weight, "weight", outputs * inputs);
  void* to = args.rows_of(dx, "dx", inputs);
  py::gil_scoped_release unlocked;
  grouped_linear_grad_input(args.job(), from, matrices, to, threads);
}

void grad_weight(py::handle grad, py::handle x, const Sizes& sizes, std::int64_t inputs, std::int64_t outputs,
                 py::handle dw, py::handle dbias, int threads) {
  GroupedArgs args("grouped_linear_grad_weight", sizes, inputs, outputs);
  const void* from = args.rows_of(grad, "grad", outputs);
  const void* rows = args.rows_of(x, "x", inputs);
  void* matrices = args.of_experts(dw, "dw", outputs * inputs);
  void* added = args.of_experts(dbias, "dbias", outputs);
  py::gil_scoped_release unlocked;
  grouped_linear_grad_weight(args.job(), from, rows, matrices, added, threads);
}

// The arguments of feed-forward blocks, checked.
class FeedForwardArgs : public GroupedArgs {
 public:
  FeedForwardArgs(const char* function, const Sizes& sizes, std::int64_t hidden, std::int64_t inner,
                  int activation)
      : GroupedArgs(function, sizes, hidden, inner), hidden_(hidden), inner_(inner), activation_(activation) {
    if (activation < 0 || activation >= kNumActivations) {
      throw py::value_error(std::string(function) + ": there is no activation function with this number");
    }
  }

  void* of_hidden(py::handle tensor, const char* name) {
    return tensor.is_none() ? nullptr : rows_of(tensor, name, hidden_);
  }
  // up, its bias, gate, its bias, down, its bias; None for those that do not exist.
  FeedForwardTensors weights(const py::tuple& tensors) {
    return {.up = of_experts(tensors[0], "up", inner_ * hidden_),
            .up_bias = of_experts(tensors[1], "up_bias", inner_),
            .gate = of_experts(tensors[2], "gate", inner_ * hidden_),
            .gate_bias = of_experts(tensors[3], "gate_bias", inner_),
            .down = of_experts(tensors[4], "down", hidden_ * inner_),
            .down_bias = of_experts(tensors[5], "down_bias", hidden_)};
  }
  FeedForwardInner of_inner(const py::tuple& tensors) {
    return {.argument = of_inner(tensors[0], "argument"),
            .factor = of_inner(tensors[1], "factor"),
            .active = of_inner(tensors[2], "active")};
  }
  GroupedFeedForward feed_forward() const {
    return {job().sizes,
            job().groups,
            num_rows(),
            hidden_,
            inner_,
            job().dtype,
            static_cast<Activation>(activation_)};
  }

 private:
  void* of_inner(py::handle tensor, const char* name) {
    return tensor.is_none() ? nullptr : rows_of(tensor, name, inner_);
  }

  std::int64_t hidden_, inner_;
  int activation_;
};

void require_gate(bool gate, bool factor) {
  if (gate != factor) throw py::value_error("grouped_feed_forward: a gate has a factor, and only a gate");
}

void feed_forward(py::handle x, const py::tuple& weights, const Sizes& sizes, std::int64_t hidden,
                  std::int64_t inner, int activation, const py::tuple& inner_values, py::handle out,
                  int threads) {
  FeedForwardArgs args("grouped_feed_forward", sizes, hidden, inner, activation);
  const void* from = args.of_hidden(x, "x");
  const FeedForwardTensors of_layers = args.weights(weights);
  const FeedForwardInner values = args.of_inner(inner_values);
  void* to = args.of_hidden(out, "out");
  require_gate(of_layers.gate != nullptr, values.factor != nullptr);
  py::gil_scoped_release unlocked;
  grouped_feed_forward(args.feed_forward(), from, of_layers, values, to, threads);
}

void feed_forward_grad(py::handle grad, py::handle x, const py::tuple& weights, const Sizes& sizes,
                       std::int64_t hidden, std::int64_t inner, int activation, const py::tuple& inner_values,
                       const py::tuple& inner_grads, const py::tuple& dx, const py::tuple& weight_grads,
                       int threads) {
  FeedForwardArgs args("grouped_feed_forward_grad", sizes, hidden, inner, activation);
  const void* of_out = args.of_hidden(grad, "grad");
  const void* from = args.of_hidden(x, "x");
  const FeedForwardTensors of_layers = args.weights(weights);
  const FeedForwardInner values = args.of_inner(inner_values), of_values = args.of_inner(inner_grads);
  void* by_up = args.of_hidden(dx[0], "dx");
  void* by_gate = args.of_hidden(dx[1], "dx_gate");
  const FeedForwardTensors grads = args.weights(weight_grads);
  const bool gated = of_layers.gate != nullptr;
  for (const void* tensor : {values.factor, of_values.factor, by_gate, grads.gate}) {
    require_gate(gated, tensor != nullptr);
  }
  py::gil_scoped_release unlocked;
  grouped_feed_forward_grad(args.feed_forward(), of_out, from, of_layers, values, of_values, by_up, by_gate,
                            grads, threads);
}

// A job of row sums whose index, (sums, choices), refers to existing rows.
class RowSumArgs {
 public:
  RowSumArgs(const char* function, py::handle index, std::int64_t choices, std::int64_t columns)
      : function_(function), reader_(function) {
    if (choices < 1 || columns < 16 || columns % 16 != 0) {
      throw py::value_error(function_ + ": the number of columns must be a multiple of 16");
    }
    const View chosen = reader_.typed(index, "index", dlpack::kInt, 64, "int64");
    if (chosen.numel % choices != 0) {
      throw py::value_error(function_ + ": index must have the same number of choices for each sum");
    }
    job_ = {static_cast<const std::int64_t*>(chosen.data),
            chosen.numel / choices,
            choices,
            0,
            columns,
            DType::kF32};
  }

  // Fixes the dtype and the number of rows. An index on a GPU is not checked: reading it would wait for the
  // device.
  const void* rows(py::handle tensor) {
    const View view = reader_.floats(tensor, "rows", on_gpu() ? kFloats : kStates);
    if (view.numel % job_.columns != 0)
      throw py::value_error(function_ + ": rows have another number of columns");
    job_.num_rows = view.numel / job_.columns;
    job_.dtype = view.dtype;
    for (std::int64_t i = 0; !on_gpu() && i < job_.sums * job_.choices; ++i) {
      if (job_.index[i] < 0 || job_.index[i] > job_.num_rows) {
        throw py::value_error(function_ + ": index names a row that does not exist");
      }
    }
    return view.data;
  }
  void* like_rows(py::handle tensor, const char* name) {
    return read(tensor, name, job_.num_rows * job_.columns);
  }
  void* like_sums(py::handle tensor, const char* name) {
    return read(tensor, name, job_.sums * job_.columns);
  }
  void* like_index(py::handle tensor, const char* name) {
    return tensor.is_none() ? nullptr : read(tensor, name, job_.sums * job_.choices);
  }
  const RowSums& job() const { return job_; }
  bool on_gpu() const { return reader_.on_gpu(); }
  int device_index() const { return reader_.device_index(); }
  void* stream() const { return reader_.stream(); }

 private:
  void* read(py::handle tensor, const char* name, std::int64_t numel) {
    const View view = reader_.floats(tensor, name, only(job_.dtype));
    reader_.require_numel(view, numel, name, -1, "the rows and the index");
    return view.data;
  }

  std::string function_;
  TensorReader reader_;
  RowSums job_{};
};

void sums(py::handle rows, py::handle index, std::int64_t choices, std::int64_t columns, py::handle weights,
          py::handle out, int threads) {
  RowSumArgs args("row_sums", index, choices, columns);
  const void* from = args.rows(rows);
  const void* factors = args.like_index(weights, "weights");
  void* to = args.like_sums(out, "out");
  if (args.on_gpu()) {
    gpu_check("row_sums",
              gpu()->row_sums(args.device_index(), &args.job(), from, factors, to, args.stream()));
    return;
  }
  py::gil_scoped_release unlocked;
  row_sums(args.job(), from, factors, to, threads);
}

void sums_grad(py::handle grad, py::handle rows, py::handle index, std::int64_t choices, std::int64_t columns,
               py::handle weights, py::handle drows, py::handle dweights, int threads) {
  RowSumArgs args("row_sums_grad", index, choices, columns);
  const void* from = args.rows(rows);
  const void* of_sums = args.like_sums(grad, "grad");
  const void* factors = args.like_index(weights, "weights");
  void* of_rows = args.like_rows(drows, "drows");
  void* of_weights = args.like_index(dweights, "dweights");
  if (factors == nullptr || of_weights == nullptr)
    throw py::value_error("row_sums_grad: weights must be tensors");
  if (args.on_gpu()) {
    gpu_check("row_sums_grad", gpu()->row_sums_grad(args.device_index(), &args.job(), of_sums, from, factors,
                                                    of_rows, of_weights, args.stream()));
    return;
  }
  py::gil_scoped_release unlocked;
  row_sums_grad(args.job(), of_sums, from, factors, of_rows, of_weights, threads);
}

}  // namespace

void bind_experts(py::module_& m) {
  m.def("grouped_feed_forward", &feed_forward);
  m.def("grouped_feed_forward_grad", &feed_forward_grad);
  m.def("grouped_linear", &forward);
  m.def("grouped_linear_grad_input", &grad_input);
  m.def("grouped_linear_grad_weight", &grad_weight);
  m.def("row_sums", &sums);
  m.def("row_sums_grad", &sums_grad);
}

}  // namespace ds::bindings
