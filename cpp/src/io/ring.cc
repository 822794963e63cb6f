#include "ring.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "system.h"

namespace ds::io {
namespace {

constexpr std::uint64_t kBell = ~std::uint64_t{0};  // user data of the poll on the eventfd

// The kernel is the other side of these.
std::uint32_t load(const std::uint32_t* value) { return __atomic_load_n(value, __ATOMIC_ACQUIRE); }
void store(std::uint32_t* value, std::uint32_t x) { __atomic_store_n(value, x, __ATOMIC_RELEASE); }

}  // namespace

Ring::Ring(unsigned depth) {
  // The bell's poll needs an entry, too. The second try is for kernels before 5.19.
  for (const std::uint32_t flags : {uring::kSetupClamp | uring::kSetupCoopTaskrun, uring::kSetupClamp}) {
    uring::Params params{};
    params.flags = flags;
    fd_ = sys_uring_setup(depth + 1, &params);
    if (fd_ < 0) {
      if (fd_ == -EINVAL && flags != uring::kSetupClamp) continue;
      throw SystemError("io_uring_setup", -fd_);
    }
    try {
      map(params);
      check_operations();
    } catch (...) {
      unmap();
      ::close(fd_);
      throw;
    }
    return;
  }
}

Ring::~Ring() {
  unmap();
  ::close(fd_);
}

void Ring::map(const uring::Params& params) {
  if ((params.features & uring::kFeatSingleMmap) == 0) throw SystemError("io_uring_setup", ENOSYS);
  rings_size_ = std::max(params.sq.array + params.sq_entries * sizeof(std::uint32_t),
                         params.cq.cqes + params.cq_entries * sizeof(uring::Cqe));
  entries_size_ = params.sq_entries * sizeof(uring::Sqe);
  auto map_at = [this](std::size_t size, std::uint64_t offset) {
    void* const memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_,
                                static_cast<off_t>(offset));
    if (memory == MAP_FAILED) throw SystemError("mmap", errno);
    ::madvise(memory, size, MADV_DONTFORK);  // a child that used them would disturb this process
    return memory;
  };
  rings_ = map_at(rings_size_, uring::kOffsetSqRing);
  entries_ = static_cast<uring::Sqe*>(map_at(entries_size_, uring::kOffsetSqes));
  char* const base = static_cast<char*>(rings_);
  auto word = [base](std::uint32_t offset) { return reinterpret_cast<std::uint32_t*>(base + offset); };
  sq_head_ = word(params.sq.head);
  sq_tail_ = word(params.sq.tail);
  sq_array_ = word(params.sq.array);
  sq_mask_ = *word(params.sq.ring_mask);
  cq_head_ = word(params.cq.head);
  cq_tail_ = word(params.cq.tail);
  cq_mask_ = *word(params.cq.ring_mask);
  completions_ = reinterpret_cast<uring::Cqe*>(base + params.cq.cqes);
  tail_ = *sq_tail_;
}

// Reads and writes without a vector are there since 5.6, like the question itself.
void Ring::check_operations() {
  uring::Probe probe{};
  if (const int result = sys_uring_register(fd_, uring::kRegisterProbe, &probe, 64); result < 0) {
    throw SystemError("io_uring_register", -result);
  }
  for (const std::uint8_t needed : {uring::kRead, uring::kWrite, uring::kPollAdd}) {
    if (needed > probe.last_opcode || (probe.ops[needed].flags & uring::kOpSupported) == 0) {
      throw SystemError("io_uring_register", EOPNOTSUPP);
    }
  }
}

void Ring::unmap() noexcept {
  if (entries_ != nullptr) ::munmap(entries_, entries_size_);
  if (rings_ != nullptr) ::munmap(rings_, rings_size_);
}

uring::Sqe& Ring::next_entry() {
  const std::uint32_t index = tail_++ & sq_mask_;
  sq_array_[index] = index;
  entries_[index] = uring::Sqe{};
  return entries_[index];
}

int Ring::enter(bool wait) {
  store(sq_tail_, tail_);
  for (;;) {
    const std::uint32_t to_submit = tail_ - load(sq_head_);
    const bool must_wait = wait && load(cq_tail_) == *cq_head_;
    if (to_submit == 0 && !must_wait) return 0;
    const int result =
        sys_uring_enter(fd_, to_submit, must_wait ? 1 : 0, must_wait ? uring::kEnterGetEvents : 0);
    // Entries that were taken before a signal came are taken: the next round counts anew.
    if (result >= 0 || result == -EINTR) continue;
    return result;
  }
}

bool Ring::pop(uring::Cqe& completion) {
  const std::uint32_t head = *cq_head_;
  if (head == load(cq_tail_)) return false;
  completion = completions_[head & cq_mask_];
  store(cq_head_, head + 1);
  return true;
}

int Ring::reserve_buffers(unsigned count) {
  uring::BuffersRegister request{};
  request.count = count;
  request.flags = uring::kRegisterSparse;
  return std::min(sys_uring_register(fd_, uring::kRegisterBuffers2, &request, sizeof request), 0);
}

int Ring::set_buffer(unsigned index, void* data, std::size_t size) {
  struct {
    void* base;
    std::size_t size;
  } range{data, size};
  uring::BuffersUpdate request{};
  request.offset = index;
  request.data = reinterpret_cast<std::uintptr_t>(&range);
  request.count = 1;
  return std::min(sys_uring_register(fd_, uring::kRegisterBuffersUpdate, &request, sizeof request), 0);
}

Bell::Bell() : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (fd_ < 0) throw SystemError("eventfd", errno);
}

Bell::~Bell() { ::close(fd_); }

void Bell::ring() const noexcept {
  const std::uint64_t one = 1;
  (void)!::write(fd_, &one, sizeof one);
}

void Bell::reset() const noexcept {
  std::uint64_t count = 0;
  (void)!::read(fd_, &count, sizeof count);
}

RingWorker::RingWorker(std::shared_ptr<State> state, unsigned depth)
    : state_(std::move(state)), ring_(depth) {
  for (unsigned i = 0; i < depth; ++i) {
    slots_.push_back(Slot{Request{}, Bounce(state_->options.block_bytes)});
    free_.push_back(depth - 1 - i);
  }
}

void RingWorker::run() {
  for (;;) {
    const bool more = fill();
    const bool idle = free_.size() == slots_.size();
    if (idle && !more && state_->should_end()) break;
    arm_bell();
    const int result = ring_.enter(reissue_.empty());
    if (result < 0) ::usleep(1000);  // the kernel is short of memory: what is in flight completes meanwhile
    uring::Cqe completion;
    while (ring_.pop(completion)) {
      if (completion.user_data == kBell) {
        bell_.reset();
        bell_armed_ = false;
      } else {
        completed(static_cast<std::size_t>(completion.user_data), completion.result);
      }
    }
  }
  state_->worker_ends();
}

// Issues requests while there are slots. True if something was issued.
bool RingWorker::fill() {
  bool issued = false;
  std::vector<std::size_t> again;
  again.swap(reissue_);
  for (const std::size_t slot : again) {
    issue(slot);
    issued = true;
  }
  while (!free_.empty()) {
    const std::size_t slot = free_.back();
    if (!state_->take(slots_[slot].request)) break;
    free_.pop_back();
    issue(slot);
    issued = true;
  }
  return issued;
}

void RingWorker::issue(std::size_t index) {
  Slot& slot = slots_[index];
  const Request& request = slot.request;
  const bool writes = request.operation->kind == Kind::kWrite;
  std::size_t size = request.size;
  if (const int code = fault(writes ? Call::kWrite : Call::kRead, &size)) {
    completed(index, -code);
    return;
  }
  char* memory = request.data;
  slot.copied = needs_bounce(request);
  if (slot.copied) {
    memory = slot.bounce.data();
    if (memory == nullptr) {
      completed(index, -ENOMEM);
      return;
    }
    if (writes) std::memcpy(memory, request.data, size);
  }
  const bool fixed = request.buffer_index >= 0 && !slot.copied;
  uring::Sqe& entry = ring_.next_entry();
  entry.opcode =
      fixed ? (writes ? uring::kWriteFixed : uring::kReadFixed) : (writes ? uring::kWrite : uring::kRead);
  entry.fd = request.operation->file->fd(request.direct);
  entry.offset = static_cast<std::uint64_t>(request.offset);
  entry.address = reinterpret_cast<std::uintptr_t>(memory);
  entry.size = static_cast<std::uint32_t>(size);
  entry.user_data = index;
  if (fixed) entry.buffer_index = static_cast<std::uint16_t>(request.buffer_index);
}

void RingWorker::completed(std::size_t index, ssize_t result) {
  Slot& slot = slots_[index];
  if (result > 0 && slot.copied && slot.request.operation->kind == Kind::kRead) {
    std::memcpy(slot.request.data, slot.bounce.data(), static_cast<std::size_t>(result));
  }
  slot.copied = false;
  if (state_->settle(slot.request, result) == Next::kReissue) {
    reissue_.push_back(index);
  } else {
    free_.push_back(index);
  }
}

void RingWorker::arm_bell() {
  if (bell_armed_) return;
  uring::Sqe& entry = ring_.next_entry();
  entry.opcode = uring::kPollAdd;
  entry.fd = bell_.fd();
  entry.op_flags = POLLIN;
  entry.user_data = kBell;
  bell_armed_ = true;
}

}  // namespace ds::io
