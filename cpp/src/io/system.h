// The system calls of the I/O engine. Tests inject faults here; without faults this costs one load per call.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "uring_abi.h"

namespace ds::io {

enum class Call { kOpen, kAllocate, kRead, kWrite, kUringSetup, kUringEnter, kUringRegister };

struct Fault {
  Call call = Call::kRead;
  std::int64_t skip = 0;      // calls that are left alone before
  std::int64_t times = 1;     // calls that are hit; -1: all from there on
  int code = 0;               // the call fails with this errno, if it is not 0
  std::int64_t at_most = -1;  // bytes that a read or write transfers at most
  bool hold = false;          // the call waits until the faults are replaced
};

// Replaces all faults of this process.
void set_faults(std::vector<Fault> faults);

// What the faults make of a call: an errno (0: none), and fewer bytes where `size` is given.
int fault(Call call, std::size_t* size = nullptr);

// These return what the system call does, or -errno.
int sys_open(const char* path, int flags, mode_t mode);
int sys_allocate(int fd, std::int64_t num_bytes);
ssize_t sys_read(int fd, void* data, std::size_t size, std::int64_t offset);
ssize_t sys_write(int fd, const void* data, std::size_t size, std::int64_t offset);
int sys_uring_setup(unsigned entries, uring::Params* params);
int sys_uring_enter(int ring, unsigned to_submit, unsigned min_complete, unsigned flags);
int sys_uring_register(int ring, unsigned opcode, const void* argument, unsigned count);

struct DirectAlignment {
  std::size_t memory;
  std::size_t offset;  // 0: there is no direct I/O for this file
};
// From statx; 4096 for both where the kernel does not say. None on a tmpfs, which ignores O_DIRECT.
DirectAlignment sys_direct_alignment(int fd);

}  // namespace ds::io
