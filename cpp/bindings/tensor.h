// From Python tensors to raw pointers: dtype, device and contiguity are checked here and nowhere below.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "dlpack.h"
#include "ds/checksum.h"
#include "ds/dtype.h"
#include "ds/formats.h"
#include "ds/update.h"

namespace ds::bindings {

namespace py = pybind11;

// Names an argument in error messages: "adam_step: grads[3]".
struct Arg {
  std::string_view function;
  std::string_view name;
  std::int64_t index = -1;
  std::string text() const;
};

// Bits of a set of dtypes.
using DTypes = unsigned;
constexpr DTypes only(DType dtype) { return 1u << static_cast<unsigned>(dtype); }
inline constexpr DTypes kFloat32 = only(DType::kF32);
inline constexpr DTypes kStates = kFloat32 | only(DType::kBF16);
inline constexpr DTypes kFloats = kStates | only(DType::kF16);

// The memory of a tensor of any dtype.
struct Span {
  void* data;
  std::size_t size;  // in bytes
};

struct View {
  void* data;
  std::int64_t numel;
  dlpack::DataType type;
  DType dtype;  // meaningful when type is one of the three
};

// Any sequence or iterator of tensors as an array of objects. Those that an iterator makes live as long as
// this object, and as the reader that reads them.
class Items {
 public:
  Items(py::handle sequence, std::string_view function, std::string_view name);
  std::size_t size() const { return static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast_.ptr())); }
  py::handle operator[](std::size_t i) const {
    return PySequence_Fast_GET_ITEM(fast_.ptr(), static_cast<Py_ssize_t>(i));
  }

 private:
  py::object fast_;
};

// Reads tensors through the C exchange table of their type, or through a DLPack capsule where there is none.
// The first tensor read fixes the device of all. Holds every object that it read, so that views are valid as
// long as the reader is, also while another thread changes the caller's lists. Everything unfit raises
// ValueError naming the argument.
class TensorReader {
 public:
  explicit TensorReader(std::string_view function) : function_(function) {}

  View floats(py::handle object, std::string_view name, DTypes allowed, std::int64_t index = -1);
  // Optimizer states: floats, or uint8 where `packed` is not null, which then says what was read.
  View states(py::handle object, std::string_view name, DTypes allowed, std::int64_t index, bool* packed);
  Span bytes(py::handle object, std::string_view name);
  View typed(py::handle object, std::string_view name, dlpack::TypeCode code, int bits,
             std::string_view type_name, std::int64_t index = -1);

  void require_count(std::size_t actual, std::size_t count, std::string_view name,
                     std::string_view like) const;
  void require_numel(const View& view, std::int64_t numel, std::string_view name, std::int64_t index,
                     std::string_view like) const;

  // Of the tensors read.
  bool on_gpu() const { return device_.type == dlpack::kCuda || device_.type == dlpack::kRocm; }
  int device_index() const { return device_.index; }
  // torch's current stream on that device.
  void* stream() const;

 private:
  View read(py::handle object, const Arg& arg);
  View as_floats(View view, const Arg& arg, DTypes allowed);
  void check_device(dlpack::Device device, const Arg& arg);

  std::string_view function_;
  dlpack::Device device_{0, 0};
  int (*current_stream_)(dlpack::DeviceType, std::int32_t, void**) = nullptr;
  std::vector<py::object> capsules_;
  std::vector<py::object> held_;
};

// One optimizer argument that holds a state per parameter.
struct StateArg {
  std::string_view name;
  py::handle list;
};

// The formats of all tensors of a step (ds/formats.h).
struct StepFormats {
  // None, or a tuple: None or a list of None or int16 tensors (master bits); None or the key of stochastic
  // rounding; whether copies round ties away.
  explicit StepFormats(py::handle given);

  py::object master_bits;
  bool stochastic = false;
  bool away = false;
  RoundingKeys keys;
  std::vector<TensorFormat> tensors;  // empty if all are plain
};

// Reads and checks the lists of an optimizer step; two states at most. `outs` may be None; `grads` is a null
// handle where the step has no gradients. Without `formats`, parameters are fp32.
std::vector<UpdateTensor> read_updates(TensorReader& reader, std::string_view function, py::handle params,
                                       std::initializer_list<StateArg> states, py::handle grads,
                                       py::handle outs, StepFormats* formats = nullptr);

// Reads where the checksums of an update go: None, or a pair of lists of int64 tensors (ds/checksum.h). CPU
// only.
std::vector<UpdateSums> read_sums(TensorReader& reader, std::string_view function, py::handle sums,
                                  const std::vector<UpdateTensor>& tensors,
                                  const std::vector<TensorFormat>& formats);

// Each file of this directory adds its functions to the module.
void bind_optimizers(py::module_& m);
void bind_lamb(py::module_& m);
void bind_reductions(py::module_& m);
void bind_attention(py::module_& m);
void bind_experts(py::module_& m);
void bind_signs(py::module_& m);
void bind_codes(py::module_& m);
void bind_memory(py::module_& m);
void bind_io(py::module_& m);
void bind_same_host(py::module_& m);

}  // namespace ds::bindings
