#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ds/arena.h"
#include "gpu.h"
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

std::atomic<std::size_t> g_locked_bytes{0};

// A block of whole pages that stay in memory: locked for the devices by the GPU library, or by mlock.
class LockedBlock {
 public:
  LockedBlock(std::size_t size, bool by_device)
      : size_((std::max(size, kArenaPageBlock) + kArenaPage - 1) / kArenaPage * kArenaPage),
        by_device_(by_device),
        data_(arena_allocate(size_)) {
    // A block of this size begins at a page and ends at one, so that no page is locked twice.
    std::string reason;
    if (by_device_) {
      if (gpu() == nullptr) {
        reason = "no GPU library is open";
      } else if (const int status = gpu()->host_register(data_, size_); status != 0) {
        reason = gpu()->message(status);
      }
    } else if (mlock(data_, size_) != 0) {
      reason = std::strerror(errno);
    }
    if (!reason.empty()) {
      arena_free(data_);
      throw std::runtime_error(reason);
    }
    g_locked_bytes += size_;
  }
  ~LockedBlock() {
    if (by_device_) {
      gpu()->host_unregister(data_);
    } else {
      munlock(data_, size_);
    }
    g_locked_bytes -= size_;
    arena_free(data_);
  }
  LockedBlock(const LockedBlock&) = delete;
  LockedBlock& operator=(const LockedBlock&) = delete;
  py::buffer_info buffer() const {
    return py::buffer_info(static_cast<unsigned char*>(data_), static_cast<py::ssize_t>(size_));
  }

 private:
  std::size_t size_;
  bool by_device_;
  void* data_;
};

}  // namespace

void bind_memory(py::module_& m) {
  py::class_<Block>(m, "Block", py::buffer_protocol())
      .def(py::init<std::size_t>())
      .def_buffer(&Block::buffer);
  py::class_<LockedBlock>(m, "LockedBlock", py::buffer_protocol())
      .def(py::init<std::size_t, bool>(), py::call_guard<py::gil_scoped_release>())
      .def_buffer(&LockedBlock::buffer);
  m.def("locked_bytes", [] { return g_locked_bytes.load(); });
  m.def("arena_stats", [] {
    const ArenaStats stats = arena_stats();
    return py::make_tuple(stats.reserved_bytes, stats.in_use_bytes, stats.num_blocks, stats.huge_pages);
  });
}

}  // namespace ds::bindings
