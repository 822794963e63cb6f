#include "system.h"

#include <fcntl.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <mutex>

namespace ds::io {
namespace {

struct Faults {
  std::atomic<bool> armed{false};
  std::mutex mutex;
  std::condition_variable replaced;
  std::uint64_t version = 0;
  std::vector<Fault> list;
};

// Never destroyed: workers may outlive every static object.
Faults& faults() {
  static Faults* const instance = new Faults;
  return *instance;
}

template <class Result>
Result or_error(Result result) {
  return result < 0 ? -errno : result;
}

// struct statx as far as the fields for direct I/O, which older headers lack.
struct Statx {
  std::uint32_t mask;
  std::uint32_t before[35];
  std::uint64_t mount_id;
  std::uint32_t direct_memory_alignment;
  std::uint32_t direct_offset_alignment;
  std::uint64_t after[12];
};
static_assert(sizeof(Statx) == 256);
constexpr unsigned kStatxDirectAlignment = 0x2000;
constexpr std::uint64_t kTmpfs = 0x01021994;

}  // namespace

void set_faults(std::vector<Fault> list) {
  Faults& all = faults();
  const std::lock_guard lock(all.mutex);
  all.armed = !list.empty();
  all.list = std::move(list);
  ++all.version;
  all.replaced.notify_all();
}

int fault(Call call, std::size_t* size) {
  Faults& all = faults();
  if (!all.armed.load(std::memory_order_relaxed)) return 0;
  std::unique_lock lock(all.mutex);
  for (Fault& one : all.list) {
    if (one.call != call || one.times == 0) continue;
    if (one.skip > 0) {
      --one.skip;
      continue;
    }
    if (one.times > 0) --one.times;
    if (size != nullptr && one.at_most >= 0 && static_cast<std::size_t>(one.at_most) < *size) {
      *size = static_cast<std::size_t>(one.at_most);
    }
    const int code = one.code;
    if (one.hold) {
      all.replaced.wait(lock, [&all, version = all.version] { return all.version != version; });
    }
    return code;
  }
  return 0;
}

int sys_open(const char* path, int flags, mode_t mode) {
  if (const int code = fault(Call::kOpen)) return -code;
  for (;;) {
    const int fd = or_error(::open(path, flags, mode));
    if (fd != -EINTR) return fd;
  }
}

int sys_allocate(int fd, std::int64_t num_bytes) {
  if (const int code = fault(Call::kAllocate)) return -code;
  int result = 0;
  do {
    result = or_error(::fallocate(fd, 0, 0, num_bytes));
  } while (result == -EINTR);
  if (result != -EOPNOTSUPP && result != -ENOSYS) return result;
  // This file system cannot allocate ahead: at least there has to be room now.
  struct statvfs volume{};
  if (::fstatvfs(fd, &volume) == 0 &&
      static_cast<double>(volume.f_bavail) * static_cast<double>(volume.f_frsize) <
          static_cast<double>(num_bytes)) {
    return -ENOSPC;
  }
  return or_error(::ftruncate(fd, num_bytes));
}

ssize_t sys_read(int fd, void* data, std::size_t size, std::int64_t offset) {
  if (const int code = fault(Call::kRead, &size)) return -code;
  return or_error(::pread(fd, data, size, offset));
}

ssize_t sys_write(int fd, const void* data, std::size_t size, std::int64_t offset) {
  if (const int code = fault(Call::kWrite, &size)) return -code;
  return or_error(::pwrite(fd, data, size, offset));
}

// The numbers of these calls are the same on every architecture that Linux has had since 5.1, except Alpha.
int sys_uring_setup(unsigned entries, uring::Params* params) {
  if (const int code = fault(Call::kUringSetup)) return -code;
  return static_cast<int>(or_error(::syscall(425, entries, params)));
}

int sys_uring_enter(int ring, unsigned to_submit, unsigned min_complete, unsigned flags) {
  if (const int code = fault(Call::kUringEnter)) return -code;
  return static_cast<int>(or_error(::syscall(426, ring, to_submit, min_complete, flags, nullptr, 0)));
}

int sys_uring_register(int ring, unsigned opcode, const void* argument, unsigned count) {
  if (const int code = fault(Call::kUringRegister)) return -code;
  return static_cast<int>(or_error(::syscall(427, ring, opcode, argument, count)));
}

DirectAlignment sys_direct_alignment(int fd) {
  struct statfs volume{};
  if (::fstatfs(fd, &volume) == 0 && static_cast<std::uint64_t>(volume.f_type) == kTmpfs) return {0, 0};
  Statx facts{};
  if (::syscall(SYS_statx, fd, "", AT_EMPTY_PATH, kStatxDirectAlignment, &facts) != 0 ||
      (facts.mask & kStatxDirectAlignment) == 0) {
    return {4096, 4096};
  }
  return {facts.direct_memory_alignment, facts.direct_offset_alignment};
}

}  // namespace ds::io
