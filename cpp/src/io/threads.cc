// The backend that works everywhere: threads that call pread and pwrite.
#include <cerrno>
#include <cstring>

#include "state.h"
#include "system.h"

namespace ds::io {
namespace {

ssize_t transfer(const Request& request, Bounce& bounce) {
  const Operation& operation = *request.operation;
  const int fd = operation.file->fd(request.direct);
  char* memory = request.data;
  std::size_t size = request.size;
  const bool copied = needs_bounce(request);
  if (copied) {
    memory = bounce.data();
    if (memory == nullptr) return -ENOMEM;
    if (operation.kind == Kind::kWrite) std::memcpy(memory, request.data, size);
  }
  if (operation.kind == Kind::kWrite) return sys_write(fd, memory, size, request.offset);
  const ssize_t result = sys_read(fd, memory, size, request.offset);
  if (copied && result > 0) std::memcpy(request.data, memory, static_cast<std::size_t>(result));
  return result;
}

}  // namespace

void run_thread_worker(const std::shared_ptr<State>& state) {
  Bounce bounce(state->options.block_bytes);
  Request request;
  while (state->wait_and_take(request)) {
    while (state->settle(request, transfer(request, bounce)) == Next::kReissue) {
    }
  }
  state->worker_ends();
}

}  // namespace ds::io
