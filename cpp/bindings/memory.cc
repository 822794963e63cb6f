#include "ds/arena.h"
#include "tensor.h"

namespace ds::bindings {
namespace {

// Memory of the arena as a Python buffer; freed with its last reference, which a tensor over it holds.
class Block {
 public:
  explicit Block(std::size_t size) : data_(arena_allocate(size)), size_(size) {}
  ~Block() { arena_free(data_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  py::buffer_info buffer() const {
    return py::buffer_info(static_cast<unsigned char*>(data_), static_cast<py::ssize_t>(size_));
  }

 private:
  void* data_;
  std::size_t size_;
};

}  // namespace

void bind_memory(py::module_& m) {
  py::class_<Block>(m, "Block", py::buffer_protocol())
      .def(py::init<std::size_t>())
      .def_buffer(&Block::buffer);
  m.def("arena_stats", [] {
    const ArenaStats stats = arena_stats();
    return py::make_tuple(stats.reserved_bytes, stats.in_use_bytes, stats.num_blocks, stats.huge_pages);
  });
}

}  // namespace ds::bindings
