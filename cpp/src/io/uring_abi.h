// The parts of the kernel's io_uring interface that are used here (include/uapi/linux/io_uring.h). Their
// layout is fixed; declared by hand so that a build needs no recent kernel headers.
#pragma once

#include <cstdint>

namespace ds::io::uring {

struct SqOffsets {
  std::uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
  std::uint64_t user_address;
};

struct CqOffsets {
  std::uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved;
  std::uint64_t user_address;
};

struct Params {
  std::uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, reserved[3];
  SqOffsets sq;
  CqOffsets cq;
};
static_assert(sizeof(Params) == 120);

struct Sqe {
  std::uint8_t opcode;
  std::uint8_t flags;
  std::uint16_t ioprio;
  std::int32_t fd;
  std::uint64_t offset;
  std::uint64_t address;
  std::uint32_t size;
  std::uint32_t op_flags;  // the events of a poll
  std::uint64_t user_data;
  std::uint16_t buffer_index;
  std::uint16_t personality;
  std::int32_t splice_fd;
  std::uint64_t reserved[2];
};
static_assert(sizeof(Sqe) == 64);

struct Cqe {
  std::uint64_t user_data;
  std::int32_t result;
  std::uint32_t flags;
};
static_assert(sizeof(Cqe) == 16);

struct BuffersRegister {
  std::uint32_t count, flags;
  std::uint64_t reserved;
  std::uint64_t data;
  std::uint64_t tags;
};

struct BuffersUpdate {
  std::uint32_t offset, reserved;
  std::uint64_t data;
  std::uint64_t tags;
  std::uint32_t count, reserved2;
};

struct ProbeOp {
  std::uint8_t opcode, reserved;
  std::uint16_t flags;
  std::uint32_t reserved2;
};

struct Probe {
  std::uint8_t last_opcode, num_ops;
  std::uint16_t reserved;
  std::uint32_t reserved2[3];
  ProbeOp ops[64];
};

inline constexpr std::uint8_t kReadFixed = 4, kWriteFixed = 5, kPollAdd = 6, kRead = 22, kWrite = 23;
inline constexpr std::uint32_t kEnterGetEvents = 1u << 0;
inline constexpr std::uint32_t kSetupClamp = 1u << 4, kSetupCoopTaskrun = 1u << 8;
inline constexpr std::uint32_t kFeatSingleMmap = 1u << 0;
inline constexpr unsigned kRegisterProbe = 8, kRegisterBuffers2 = 15, kRegisterBuffersUpdate = 16;
inline constexpr std::uint32_t kRegisterSparse = 1u << 0;
inline constexpr std::uint16_t kOpSupported = 1u << 0;
inline constexpr std::uint64_t kOffsetSqRing = 0, kOffsetSqes = 0x10000000;

}  // namespace ds::io::uring
