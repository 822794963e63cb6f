// Engines, files and operations of ds/io.h. ds_core.io is the public face and words the errors.
#include "ds/io.h"

#include <pybind11/stl.h>

#include <cerrno>
#include <chrono>
#include <deque>

#include "io/system.h"
#include "tensor.h"

namespace ds::bindings {
namespace {

using Clock = std::chrono::steady_clock;

// An operation and the tensor whose memory it uses.
struct Held {
  std::shared_ptr<io::Operation> operation;
  py::object tensor;
};

struct PyFile {
  std::shared_ptr<io::File> file;
  io::File& get() const {
    if (file == nullptr) throw py::value_error("the file is closed");
    return *file;
  }
};

// (errno or 0, offset in the file, size of a file that ended early or -1, bytes done, seen on which file,
// ...)
py::tuple facts(const io::Operation& operation, const io::Status& status) {
  const io::Failure failure = status.failure.value_or(io::Failure{});
  return py::make_tuple(failure.code, failure.offset, failure.file_bytes, status.bytes_done,
                        io::path_of(io::file_of(operation)), io::kind_of(operation) == io::Kind::kWrite,
                        io::offset_of(operation), io::size_of(operation));
}

// Workers never touch Python objects, so tensors are let go here, by the thread that has the GIL.
class PyEngine {
 public:
  PyEngine(const std::string& backend, std::size_t block_bytes, unsigned queue_depth, unsigned num_threads,
           bool direct, double stall_limit_s)
      : stall_limit_s_(stall_limit_s) {
    io::Options options;
    options.backend = backend == "io_uring"  ? io::Backend::kUring
                      : backend == "threads" ? io::Backend::kThreads
                                             : io::Backend::kAuto;
    options.block_bytes = block_bytes;
    options.queue_depth = queue_depth;
    options.num_threads = num_threads;
    options.direct = direct;
    options.stall_limit_s = stall_limit_s;
    engine_ = std::make_unique<io::Engine>(options);
  }
  PyEngine(const PyEngine&) = delete;
  PyEngine& operator=(const PyEngine&) = delete;

  ~PyEngine() {
    {
      const py::gil_scoped_release release;
      engine_.reset();
    }
    release_done();
    // What is still in flight reads or writes the memory of these for as long as the process lives.
    if (!held_.empty() || !registered_.empty()) {
      new std::deque<std::shared_ptr<Held>>(std::move(held_));
      new std::vector<py::object>(std::move(registered_));
    }
  }

  io::Engine& engine() { return *engine_; }

  std::shared_ptr<Held> submit(bool write, const PyFile& file, py::handle tensor, std::int64_t offset) {
    release_done();
    TensorReader reader(write ? "File.write" : "File.read");
    const Span span = reader.bytes(tensor, "tensor");
    file.get();
    auto held = std::make_shared<Held>();
    held->tensor = py::reinterpret_borrow<py::object>(tensor);
    held->operation =
        engine_->submit(write ? io::Kind::kWrite : io::Kind::kRead, file.file, span.data, span.size, offset);
    held_.push_back(held);
    return held;
  }

  // Waits for an operation, for all of a file, or (both null) for all: at most `timeout_s`, or until nothing
  // has moved for the stall limit. False if something is still running.
  bool wait(const io::Operation* operation, const io::File* file, std::optional<double> timeout_s) {
    Clock::time_point since = Clock::now();
    std::uint64_t progress = engine_->progress();
    for (;;) {
      const double passed = std::chrono::duration<double>(Clock::now() - since).count();
      const double rest = timeout_s.value_or(stall_limit_s_) - passed;
      bool finished = false;
      {
        const py::gil_scoped_release release;
        const double slice = std::min(std::max(rest, 0.0), 0.1);  // signals are looked for in between
        finished = file != nullptr ? engine_->wait(*file, slice) : engine_->wait(operation, slice);
      }
      if (finished) return true;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!timeout_s.has_value() && engine_->progress() != progress) {
        progress = engine_->progress();
        since = Clock::now();
      } else if (rest <= 0) {
        return false;
      }
    }
  }

  py::list unseen_failures(const PyFile* file) {
    py::list list;
    for (const auto& operation : engine_->unseen_failures(file == nullptr ? nullptr : file->file.get())) {
      list.append(facts(*operation, io::status(*operation)));
    }
    return list;
  }

  std::string register_memory(py::handle tensor) {
    const Span span = TensorReader("Engine.register").bytes(tensor, "tensor");
    const std::string reason = engine_->register_memory(span.data, span.size);
    if (reason.empty()) registered_.push_back(py::reinterpret_borrow<py::object>(tensor));
    return reason;
  }

  void forget_memory(py::handle tensor) {
    const Span span = TensorReader("Engine.unregister").bytes(tensor, "tensor");
    engine_->forget_memory(span.data);
    std::erase_if(registered_, [&](const py::object& other) { return other.is(tensor); });
  }

  // Tensors whose operations are done belong to their users again.
  void release_done() {
    while (!held_.empty() && is_done(*held_.front())) {
      const std::shared_ptr<Held> front = std::move(held_.front());
      held_.pop_front();
      front->tensor = py::object();
    }
  }

  static bool is_done(const Held& held) { return io::is_done(*held.operation); }

 private:
  double stall_limit_s_;
  std::unique_ptr<io::Engine> engine_;
  std::deque<std::shared_ptr<Held>> held_;
  std::vector<py::object> registered_;
};

class PyWork {
 public:
  PyWork(std::shared_ptr<PyEngine> engine, std::shared_ptr<Held> held)
      : engine_(std::move(engine)), held_(std::move(held)) {}

  bool done() const { return PyEngine::is_done(*held_); }

  // (done, facts)
  py::tuple wait(std::optional<double> timeout_s) {
    const bool finished = done() || engine_->wait(held_->operation.get(), nullptr, timeout_s);
    if (finished) {
      held_->tensor = py::object();
      engine_->release_done();
    }
    return py::make_tuple(finished, facts(*held_->operation, io::status(*held_->operation)));
  }

 private:
  std::shared_ptr<PyEngine> engine_;
  std::shared_ptr<Held> held_;
};

[[noreturn]] void raise_os_error(const io::SystemError& error, const std::string& path) {
  const py::object arguments = path.empty() ? py::object(py::make_tuple(error.code, error.what()))
                                            : py::object(py::make_tuple(error.code, error.what(), path));
  PyErr_SetObject(PyExc_OSError, arguments.ptr());
  throw py::error_already_set();
}

io::Call call_of(const std::string& name) {
  const std::pair<const char*, io::Call> names[] = {
      {"open", io::Call::kOpen},
      {"allocate", io::Call::kAllocate},
      {"read", io::Call::kRead},
      {"write", io::Call::kWrite},
      {"io_uring_setup", io::Call::kUringSetup},
      {"io_uring_enter", io::Call::kUringEnter},
      {"io_uring_register", io::Call::kUringRegister},
  };
  for (const auto& [text, call] : names) {
    if (name == text) return call;
  }
  throw py::value_error("no system call of the I/O engine is called '" + name + "'");
}

void bind_engine(py::module_& m) {
  using Engine = PyEngine;
  py::class_<Engine, std::shared_ptr<Engine>>(m, "IoEngine")
      .def(py::init([](const std::string& backend, std::size_t block_bytes, unsigned queue_depth,
                       unsigned num_threads, bool direct, double stall_limit_s) {
        try {
          return std::make_shared<Engine>(backend, block_bytes, queue_depth, num_threads, direct,
                                          stall_limit_s);
        } catch (const io::SystemError& error) {
          raise_os_error(error, "");
        }
      }))
      .def_property_readonly(
          "backend",
          [](Engine& e) { return e.engine().backend() == io::Backend::kUring ? "io_uring" : "threads"; })
      .def_property_readonly("reason", [](Engine& e) { return e.engine().reason(); })
      .def("open",
           [](Engine& e, const std::string& path, bool create, bool exclusive, bool read_only,
              std::int64_t num_bytes) {
             try {
               const py::gil_scoped_release release;  // allocating takes a while on some file systems
               return PyFile{e.engine().open(path, {create, exclusive, read_only, num_bytes})};
             } catch (const io::SystemError& error) {
               raise_os_error(error, path);
             }
           })
      .def("submit", [](const std::shared_ptr<Engine>& e, bool write, const PyFile& file, py::handle tensor,
                        std::int64_t offset) { return PyWork(e, e->submit(write, file, tensor, offset)); })
      .def("wait_all",
           [](Engine& e, std::optional<double> timeout_s) { return e.wait(nullptr, nullptr, timeout_s); })
      .def("wait_file",
           [](Engine& e, const PyFile& file, std::optional<double> timeout_s) {
             return e.wait(nullptr, &file.get(), timeout_s);
           })
      .def("unseen_failures", &Engine::unseen_failures)
      .def("register_memory", &Engine::register_memory)
      .def("forget_memory", &Engine::forget_memory)
      .def("in_process_of_creation", [](Engine& e) { return e.engine().in_process_of_creation(); })
      .def("release_done", &Engine::release_done)
      .def("stop", [](Engine& e) {
        const bool all_done = e.engine().stop();
        if (e.engine().in_process_of_creation()) e.release_done();
        return all_done;
      });
}

}  // namespace

void bind_io(py::module_& m) {
  py::class_<PyFile>(m, "IoFile")
      .def_property_readonly("num_bytes",
                             [](const PyFile& f) {
                               try {
                                 return io::num_bytes_of(f.get());
                               } catch (const io::SystemError& error) {
                                 raise_os_error(error, io::path_of(f.get()));
                               }
                             })
      .def_property_readonly("closed", [](const PyFile& f) { return f.file == nullptr; })
      .def_property_readonly("direct", [](const PyFile& f) { return io::is_direct(f.get()); })
      .def_property_readonly("reason", [](const PyFile& f) { return io::reason_of(f.get()); })
      .def_property_readonly("offset_alignment",
                             [](const PyFile& f) { return io::offset_alignment_of(f.get()); })
      .def_property_readonly("memory_alignment",
                             [](const PyFile& f) { return io::memory_alignment_of(f.get()); })
      .def("close", [](PyFile& f) { f.file.reset(); });
  py::class_<PyWork>(m, "IoWork").def("done", &PyWork::done).def("wait", &PyWork::wait);
  bind_engine(m);
  m.def("io_uring_reason", &io::uring_reason);
  // For tests: (call, skip, times, errno, at most so many bytes, hold) each.
  m.def("_io_set_faults",
        [](const std::vector<std::tuple<std::string, std::int64_t, std::int64_t, int, std::int64_t, bool>>&
               list) {
          std::vector<io::Fault> faults;
          for (const auto& [call, skip, times, code, at_most, hold] : list) {
            faults.push_back({call_of(call), skip, times, code, at_most, hold});
          }
          io::set_faults(std::move(faults));
        });
}

}  // namespace ds::bindings
