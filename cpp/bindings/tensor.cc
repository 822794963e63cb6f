#include "tensor.h"

#include <optional>
#include <utility>

#include "gpu.h"

namespace ds::bindings {
namespace {

using dlpack::ExchangeTable;

const ExchangeTable* find_table(PyTypeObject* type) {
  py::object capsule =
      py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* header =
      static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header != nullptr && header->version.major != 1) header = header->previous;
  const auto* table = reinterpret_cast<const ExchangeTable*>(header);
  return table != nullptr && table->borrow != nullptr ? table : nullptr;
}

// Nearly all calls see two types, Tensor and Parameter; their types are never freed while a tensor of theirs
// is held.
const ExchangeTable* table_of(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type;
    const ExchangeTable* table;
  };
  static thread_local Entry recent[2] = {};
  for (const Entry& entry : recent) {
    if (entry.type == type) return entry.table;
  }
  const ExchangeTable* table = find_table(type);
  // Heap types that can die are not remembered: another type could take their address.
  if (table != nullptr) {
    Py_INCREF(reinterpret_cast<PyObject*>(type));
    if (recent[1].type != nullptr) Py_DECREF(reinterpret_cast<PyObject*>(recent[1].type));
    recent[1] = recent[0];
    recent[0] = {type, table};
  }
  return table;
}

std::string dtype_name(dlpack::DataType type) {
  const std::string bits = std::to_string(type.bits);
  switch (type.code) {
    case dlpack::kInt:
      return "int" + bits;
    case dlpack::kUInt:
      return "uint" + bits;
    case dlpack::kFloat:
      return "float" + bits;
    case dlpack::kBfloat:
      return "bfloat" + bits;
    case dlpack::kComplex:
      return "complex" + bits;
    case dlpack::kBool:
      return "bool";
    default:
      return "DLPack type " + std::to_string(type.code) + " of " + bits + " bits";
  }
}

std::string device_name(dlpack::Device device) {
  switch (device.type) {
    case dlpack::kCuda:
    case dlpack::kCudaManaged:
    case dlpack::kRocm:
      return "cuda:" + std::to_string(device.index);
    case dlpack::kCpu:
    case dlpack::kCudaHost:
    case dlpack::kRocmHost:
      return "the CPU";
    default:
      return "DLPack device " + std::to_string(device.type);
  }
}

std::string names(DTypes allowed) {
  std::string text;
  const char* const all[] = {"float32", "bfloat16", "float16"};
  if (allowed == 0) return "uint8";  // as the first state
  for (unsigned i = 0; i < kNumDTypes; ++i) {
    if ((allowed >> i & 1u) != 0) text += (text.empty() ? "" : " or ") + std::string(all[i]);
  }
  return text;
}

bool is_contiguous(const dlpack::Tensor& t) {
  if (t.strides == nullptr) return true;
  std::int64_t expected = 1;
  for (int dim = t.ndim - 1; dim >= 0; --dim) {
    if (t.shape[dim] == 1) continue;
    if (t.strides[dim] != expected) return false;
    expected *= t.shape[dim];
  }
  return true;
}

[[noreturn]] void fail(const Arg& arg, const std::string& what) {
  throw py::value_error(arg.text() + " " + what);
}

// Whether torch would have to flip the signs of what is read (torch's negative bit, as on `x.conj().imag`).
bool is_negated(py::handle object) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  const py::object answer =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), is_neg));
  if (answer) return answer.ptr() == Py_True;
  if (PyErr_ExceptionMatches(PyExc_AttributeError) == 0) throw py::error_already_set();
  PyErr_Clear();  // a tensor of another library
  return false;
}

// Whether there is memory behind a tensor of torch's with elements. FakeTensors have none, nor has a storage
// that was resized to 0; what DLPack gives is then the offset of the view. No memory of a 64-bit process lies
// that low, except its own heap where it is linked to fixed addresses: such tensors are looked at again.
bool has_memory(py::handle object, const void* data) {
  constexpr std::uintptr_t kLowest = std::uintptr_t{1} << 40;
  if (reinterpret_cast<std::uintptr_t>(data) >= kLowest) return true;
  if (data == nullptr) return false;
  try {
    return object.attr("untyped_storage")().attr("data_ptr")().cast<std::uintptr_t>() != 0;
  } catch (const py::error_already_set&) {
    return false;  // a tensor that refuses to say where it lies
  }
}

bool is_host(dlpack::Device device) {
  return device.type == dlpack::kCpu || device.type == dlpack::kCudaHost || device.type == dlpack::kRocmHost;
}

}  // namespace

std::string Arg::text() const {
  std::string text = std::string(function) + ": " + std::string(name);
  if (index >= 0) text += "[" + std::to_string(index) + "]";
  return text;
}

View TensorReader::read(py::handle object, const Arg& arg) {
  dlpack::Tensor borrowed{};
  const dlpack::Tensor* t = &borrowed;
  const ExchangeTable* const table = table_of(Py_TYPE(object.ptr()));
  bool negated = false;
  try {
    if (table != nullptr) {
      negated = is_negated(object);
      current_stream_ = table->current_stream;
      if (table->borrow(object.ptr(), &borrowed) != 0) throw py::error_already_set();
    } else {
      py::object plain = py::hasattr(object, "detach") ? object.attr("detach")()
                                                       : py::reinterpret_borrow<py::object>(object);
      capsules_.push_back(plain.attr("__dlpack__")());
      auto* managed =
          static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsules_.back().ptr(), "dltensor"));
      if (managed == nullptr) throw py::error_already_set();
      t = &managed->tensor;
    }
  } catch (py::error_already_set& error) {
    const std::string message = py::str(error.value());
    fail(arg, "cannot be read as a strided tensor (it is a " +
                  std::string(py::str(py::type::of(object).attr("__name__"))) +
                  "): " + message.substr(0, message.find('\n')));
  }
  std::int64_t numel = 1;
  for (int dim = 0; dim < t->ndim; ++dim) numel *= t->shape[dim];
  check_device(t->device, arg);
  if (numel != 0 && !is_contiguous(*t)) fail(arg, "must be contiguous; pass x.contiguous() or a flat view");
  if (negated) fail(arg, "is a view whose signs torch flips when it reads; pass x.resolve_neg()");
  void* const data = static_cast<char*>(t->data) + t->byte_offset;
  if (numel != 0 && !(table != nullptr ? has_memory(object, data) : data != nullptr)) {
    fail(arg, "has no memory: it is a FakeTensor, or its storage was freed");
  }
  held_.push_back(py::reinterpret_borrow<py::object>(object));
  return {data, numel, t->dtype, DType::kF32};
}

void TensorReader::check_device(dlpack::Device device, const Arg& arg) {
  if (is_host(device)) device = {dlpack::kCpu, 0};
  if (device_.type == 0) {
    device_ = device;
    const bool usable =
        device.type == dlpack::kCpu || (on_gpu() && gpu() != nullptr && current_stream_ != nullptr);
    if (!usable) fail(arg, "must be on the CPU, but is on " + device_name(device));
  } else if (device.type != device_.type || device.index != device_.index) {
    fail(arg,
         "is on " + device_name(device) + ", but the arguments before it are on " + device_name(device_));
  }
}

void* TensorReader::stream() const {
  void* stream = nullptr;
  if (current_stream_(static_cast<dlpack::DeviceType>(device_.type), device_.index, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

View TensorReader::floats(py::handle object, std::string_view name, DTypes allowed, std::int64_t index) {
  const Arg arg{function_, name, index};
  return as_floats(read(object, arg), arg, allowed);
}

View TensorReader::states(py::handle object, std::string_view name, DTypes allowed, std::int64_t index,
                          bool* packed) {
  const Arg arg{function_, name, index};
  const View view = read(object, arg);
  if (packed != nullptr) {
    *packed = view.type.code == dlpack::kUInt && view.type.bits == 8;
    if (*packed) return view;
  }
  return as_floats(view, arg, allowed);
}

View TensorReader::as_floats(View view, const Arg& arg, DTypes allowed) {
  bool known = true;
  if (view.type.code == dlpack::kFloat && view.type.bits == 32) {
    view.dtype = DType::kF32;
  } else if (view.type.code == dlpack::kBfloat && view.type.bits == 16) {
    view.dtype = DType::kBF16;
  } else if (view.type.code == dlpack::kFloat && view.type.bits == 16) {
    view.dtype = DType::kF16;
  } else {
    known = false;
  }
  if (!known || (allowed & only(view.dtype)) == 0) {
    fail(arg, "must be " + names(allowed) + ", but is " + dtype_name(view.type));
  }
  return view;
}

Span TensorReader::bytes(py::handle object, std::string_view name) {
  const View view = read(object, {function_, name});
  if (on_gpu()) fail({function_, name}, "must be on the CPU, but is on " + device_name(device_));
  const std::int64_t bits = std::int64_t{view.type.bits} * view.type.lanes;
  if (bits % 8 != 0)
    fail({function_, name}, "has elements of " + std::to_string(bits) + " bits; view it as uint8");
  return {view.data, static_cast<std::size_t>(view.numel * bits / 8)};
}

View TensorReader::typed(py::handle object, std::string_view name, dlpack::TypeCode code, int bits,
                         std::string_view type_name, std::int64_t index) {
  const Arg arg{function_, name, index};
  const View view = read(object, arg);
  if (view.type.code != code || view.type.bits != bits) {
    fail(arg, "must be " + std::string(type_name) + ", but is " + dtype_name(view.type));
  }
  return view;
}

void TensorReader::require_count(std::size_t actual, std::size_t count, std::string_view name,
                                 std::string_view like) const {
  if (actual == count) return;
  fail({function_, name}, "has " + std::to_string(actual) + " tensors, but " + std::string(like) + " has " +
                              std::to_string(count));
}

void TensorReader::require_numel(const View& view, std::int64_t numel, std::string_view name,
                                 std::int64_t index, std::string_view like) const {
  if (view.numel == numel) return;
  fail({function_, name, index}, "has " + std::to_string(view.numel) + " elements, but " +
                                     Arg{"", like, index}.text().substr(2) + " has " + std::to_string(numel));
}

Items::Items(py::handle sequence, std::string_view function, std::string_view name) {
  // A tensor is iterable, too: its rows are not what was meant, and those of a sparse one die with the
  // iterator.
  if (table_of(Py_TYPE(sequence.ptr())) != nullptr || py::hasattr(sequence, "__dlpack__")) {
    fail({function, name}, "must be a sequence of tensors, but is one tensor; pass [x]");
  }
  fast_ = py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), ""));
  if (!fast_) {
    PyErr_Clear();
    fail({function, name}, "must be a sequence of tensors, but is a " +
                               std::string(py::str(py::type::of(sequence).attr("__name__"))));
  }
}

StepFormats::StepFormats(py::handle given) : master_bits(py::none()) {
  if (given.is_none()) return;
  const auto parts = py::cast<py::tuple>(given);
  master_bits = parts[0];
  stochastic = !parts[1].is_none();
  if (stochastic) {
    const auto key = py::cast<std::uint64_t>(parts[1]);
    keys.state[0] = static_cast<std::uint32_t>(key);
    keys.state[1] = static_cast<std::uint32_t>(key >> 32);
  }
  away = py::cast<bool>(parts[2]);
}

namespace {

// The format of one tensor, whose parameter and states have been read.
class FormatReader {
 public:
  FormatReader(TensorReader& reader, std::string_view function, StepFormats& formats, std::size_t count)
      : reader_(reader), function_(function), formats_(formats) {
    if (formats.master_bits.is_none()) return;
    low_.emplace(formats.master_bits, function, "master_bits");
    reader.require_count(low_->size(), count, "master_bits", "params");
  }

  TensorFormat read(std::int64_t index, const View& param, const UpdateTensor& t) {
    TensorFormat format;
    format.param_dtype = param.dtype;
    if (low_ && !(*low_)[static_cast<std::size_t>(index)].is_none()) {
      if (param.dtype != DType::kBF16) {
        fail({function_, "params", index}, "must be bfloat16 if it has master_bits");
      }
      const View low = reader_.typed((*low_)[static_cast<std::size_t>(index)], "master_bits", dlpack::kInt,
                                     16, "int16", index);
      reader_.require_numel(low, param.numel, "master_bits", index, "params");
      format.low = static_cast<std::int16_t*>(low.data);
    }
    if (t.state_dtype == DType::kU8 && !formats_.stochastic) {
      fail({function_, "rounding", -1}, "is None, but 8-bit states are rounded stochastically; pass a key");
    }
    format.stochastic = formats_.stochastic && t.states[0] != nullptr && t.state_dtype == DType::kBF16;
    format.away =
        formats_.away && t.out != nullptr && t.out_dtype == DType::kBF16 && format.param_dtype == DType::kF32;
    return format;
  }

 private:
  TensorReader& reader_;
  std::string_view function_;
  StepFormats& formats_;
  std::optional<Items> low_;
};

}  // namespace

std::vector<UpdateTensor> read_updates(TensorReader& reader, std::string_view function, py::handle params,
                                       std::initializer_list<StateArg> states, py::handle grads,
                                       py::handle outs, StepFormats* formats) {
  const Items p(params, function, "params");
  const bool with_grads = grads.ptr() != nullptr;
  const Items g(with_grads ? grads : params, function, "grads");
  const Items o(outs.is_none() ? params : outs, function, "out");
  reader.require_count(g.size(), p.size(), "grads", "params");
  reader.require_count(o.size(), p.size(), "out", "params");
  std::vector<Items> lists;
  for (const StateArg& state : states) {
    lists.emplace_back(state.list, function, state.name);
    reader.require_count(lists.back().size(), p.size(), state.name, "params");
  }
  std::optional<FormatReader> format_reader;
  if (formats != nullptr) format_reader.emplace(reader, function, *formats, p.size());

  std::vector<UpdateTensor> tensors;
  tensors.reserve(p.size());
  std::vector<TensorFormat> read;
  bool plain = true;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const auto index = static_cast<std::int64_t>(i);
    const View param = reader.floats(p[i], "params", formats != nullptr ? kFloats : kFloat32, index);
    if (reader.on_gpu() && param.dtype != DType::kF32) {
      fail({function, "params", index}, "must be float32 on a GPU");
    }
    auto like_param = [&](const View& view, std::string_view name) {
      reader.require_numel(view, param.numel, name, index, "params");
      return view;
    };
    UpdateTensor t{static_cast<float*>(param.data),
                   {nullptr, nullptr},
                   nullptr,
                   nullptr,
                   param.numel,
                   DType::kF32,
                   DType::kF32,
                   DType::kF32};
    DTypes state_dtypes = kStates;
    // 8-bit states are both moments of Adam.
    bool packed = formats != nullptr && lists.size() == 2 && !reader.on_gpu();
    for (std::size_t k = 0; k < lists.size(); ++k) {
      const std::string_view name = states.begin()[k].name;
      const View state =
          like_param(reader.states(lists[k][i], name, state_dtypes, index, packed ? &packed : nullptr), name);
      if (packed && k == 0) state_dtypes = 0;
      t.states[k] = state.data;
      t.state_dtype = packed ? DType::kU8 : state.dtype;
      if (!packed) state_dtypes = only(state.dtype);  // the states of one tensor share their dtype
    }
    if (with_grads) {
      const View grad = like_param(reader.floats(g[i], "grads", kFloats, index), "grads");
      t.grad = grad.data;
      t.grad_dtype = grad.dtype;
    }
    if (!outs.is_none() && !o[i].is_none()) {
      const View out = like_param(reader.floats(o[i], "out", kFloats, index), "out");
      t.out = out.data;
      t.out_dtype = out.dtype;
    }
    tensors.push_back(t);
    if (!format_reader) continue;
    read.push_back(format_reader->read(index, param, t));
    plain = plain && read.back().plain();
  }
  if (formats != nullptr && !plain) formats->tensors = std::move(read);
  return tensors;
}

std::vector<UpdateSums> read_sums(TensorReader& reader, std::string_view function, py::handle sums,
                                  const std::vector<UpdateTensor>& tensors,
                                  const std::vector<TensorFormat>& formats) {
  std::vector<UpdateSums> all;
  if (sums.is_none()) return all;
  const auto pair = py::cast<py::tuple>(sums);
  const Items read(pair[0], function, "checksums[0]");
  const Items written(pair[1], function, "checksums[1]");
  reader.require_count(read.size(), tensors.size(), "checksums[0]", "params");
  reader.require_count(written.size(), tensors.size(), "checksums[1]", "params");
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const UpdateTensor& t = tensors[i];
    const int rows = num_sum_rows(t, formats.empty() ? TensorFormat{} : formats[i]);
    auto rows_of = [&](py::handle object, std::string_view name) {
      const auto index = static_cast<std::int64_t>(i);
      const View view = reader.typed(object, name, dlpack::kInt, 64, "int64", index);
      reader.require_numel(view, rows * num_checksums(t.numel), name, index, "the list of rows and blocks");
      return static_cast<std::uint64_t*>(view.data);
    };
    all.push_back({rows_of(read[i], "checksums[0]"), rows_of(written[i], "checksums[1]")});
  }
  return all;
}

}  // namespace ds::bindings
