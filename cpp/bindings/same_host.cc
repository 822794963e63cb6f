// Teams of ds/same_host.h. ds_core.same_host is the public face and words the errors.
#include "ds/same_host.h"

#include <pybind11/stl.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "tensor.h"

namespace ds::bindings {
namespace {

namespace sh = same_host;

// Python's signals are handled while this process waits for others.
bool interrupted() {
  const py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

// (fault, rank, errno, their kind, their element, their op, their root, their bytes)
py::tuple facts(const sh::Result& result) {
  if (result.fault == sh::Fault::kInterrupted) throw py::error_already_set();
  const sh::Call& theirs = result.theirs;
  return py::make_tuple(static_cast<int>(result.fault), result.rank, result.code,
                        static_cast<int>(theirs.kind), static_cast<int>(theirs.element),
                        static_cast<int>(theirs.op), theirs.root, theirs.bytes);
}

template <typename Run>
py::tuple run(Run call) {
  sh::Result result;
  {
    const py::gil_scoped_release unlocked;
    result = call();
  }
  return facts(result);
}

void require_bytes(const Span& span, std::size_t bytes, const char* name) {
  if (span.size != bytes) {
    throw py::value_error(std::string(name) + " has " + std::to_string(span.size) + " bytes, but " +
                          std::to_string(bytes) + " are needed");
  }
}

std::size_t sum(const std::vector<std::uint64_t>& sizes) {
  std::size_t total = 0;
  for (const std::uint64_t size : sizes) total += size;
  return total;
}

void require_ranks(const sh::Team& team, std::size_t count, const char* name) {
  if (count != static_cast<std::size_t>(team.size())) {
    throw py::value_error(std::string(name) + " has " + std::to_string(count) + " entries for " +
                          std::to_string(team.size()) + " ranks");
  }
}

}  // namespace

void bind_same_host(py::module_& m) {
  using Team = sh::Team;
  m.attr("same_host_max_ranks") = sh::kMaxRanks;
  m.def("same_host_segment", [](int num_ranks) {
    const int fd = sh::create_segment(num_ranks);
    if (fd < 0) {
      PyErr_SetFromErrno(PyExc_OSError);
      throw py::error_already_set();
    }
    return fd;
  });
  // Whether the 8 bytes at `address` of process `pid` are `token`, and may be written (with the same value).
  m.def("same_host_reaches", [](int pid, std::uint64_t address, std::int64_t token) {
    std::int64_t seen = 0;
    void* there = reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));  // NOLINT
    return sh::read_memory(pid, there, &seen, sizeof seen) == 0 && seen == token &&
           sh::write_memory(pid, &seen, there, sizeof seen) == 0;
  });
  py::class_<Team>(m, "SameHostTeam")
      .def(py::init([](int fd, int rank, const std::vector<int>& pids, double limit_s) {
        try {
          return std::make_unique<Team>(fd, rank, pids, limit_s);
        } catch (const std::system_error& error) {
          errno = error.code().value();
          PyErr_SetFromErrno(PyExc_OSError);
          throw py::error_already_set();
        }
      }))
      .def("barrier", [](Team& team) { return run([&] { return team.barrier(interrupted); }); })
      .def("all_reduce",
           [](Team& team, py::handle tensor, int element, int op) {
             TensorReader reader("all_reduce");
             const Span data = reader.bytes(tensor, "tensor");
             const auto kind = static_cast<sh::Element>(element);
             const auto numel = static_cast<std::int64_t>(data.size / sh::size_of(kind));
             return run([&] {
               return team.all_reduce(data.data, numel, kind, static_cast<sh::Op>(op), interrupted);
             });
           })
      .def("reduce_scatter",
           [](Team& team, py::handle output, py::handle input, int element, int op) {
             TensorReader reader("reduce_scatter");
             const Span out = reader.bytes(output, "output"), in = reader.bytes(input, "input");
             require_bytes(in, out.size * static_cast<std::size_t>(team.size()), "reduce_scatter: input");
             const auto kind = static_cast<sh::Element>(element);
             const auto numel = static_cast<std::int64_t>(out.size / sh::size_of(kind));
             return run([&] {
               return team.reduce_scatter(out.data, in.data, numel, kind, static_cast<sh::Op>(op),
                                          interrupted);
             });
           })
      .def("all_gather",
           [](Team& team, py::handle output, py::handle input, const std::vector<std::uint64_t>& sizes) {
             TensorReader reader("all_gather");
             const Span out = reader.bytes(output, "output"), in = reader.bytes(input, "input");
             require_ranks(team, sizes.size(), "all_gather: sizes");
             require_bytes(out, sum(sizes), "all_gather: output");
             require_bytes(in, sizes[static_cast<std::size_t>(team.rank())], "all_gather: input");
             return run([&] { return team.all_gather(out.data, in.data, sizes, interrupted); });
           })
      .def("broadcast",
           [](Team& team, py::handle tensor, int root) {
             TensorReader reader("broadcast");
             const Span data = reader.bytes(tensor, "tensor");
             if (root < 0 || root >= team.size()) throw py::value_error("broadcast: there is no such rank");
             return run([&] { return team.broadcast(data.data, data.size, root, interrupted); });
           })
      .def("all_to_all",
           [](Team& team, py::handle output, const std::vector<std::uint64_t>& out_sizes, py::handle input,
              const std::vector<std::uint64_t>& in_sizes) {
             TensorReader reader("all_to_all");
             const Span out = reader.bytes(output, "output"), in = reader.bytes(input, "input");
             require_ranks(team, out_sizes.size(), "all_to_all: output sizes");
             require_ranks(team, in_sizes.size(), "all_to_all: input sizes");
             require_bytes(out, sum(out_sizes), "all_to_all: output");
             require_bytes(in, sum(in_sizes), "all_to_all: input");
             return run([&] { return team.all_to_all(out.data, out_sizes, in.data, in_sizes, interrupted); });
           })
      .def("leave", [](Team& team) { team.leave(); });
}

}  // namespace ds::bindings
