#include "file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "system.h"

namespace ds::io {

SystemError::SystemError(std::string name, int error)
    : std::runtime_error(name + ": " + std::strerror(error)), call(std::move(name)), code(error) {}

File::File(std::string path, const OpenOptions& options, bool direct)
    : path_(std::move(path)), read_only_(options.read_only) {
  if (options.create) {
    create(options);
  } else {
    buffered_ = sys_open(path_.c_str(), (read_only_ ? O_RDONLY : O_RDWR) | O_CLOEXEC, 0);
    if (buffered_ < 0) throw SystemError("open", -buffered_);
  }
  try {
    struct stat facts{};
    if (::fstat(buffered_, &facts) != 0) throw SystemError("fstat", errno);
    if (S_ISDIR(facts.st_mode)) throw SystemError("open", EISDIR);
    if (!S_ISREG(facts.st_mode) && !S_ISBLK(facts.st_mode)) throw SystemError("open", ESPIPE);
    if (direct) {
      open_direct();
    } else {
      reason_ = "the engine was made with direct=False";
    }
  } catch (...) {
    ::close(buffered_);
    throw;
  }
}

File::~File() {
  if (direct_ >= 0) ::close(direct_);
  if (buffered_ >= 0) ::close(buffered_);
}

void File::create(const OpenOptions& options) {
  constexpr int kFlags = O_RDWR | O_CREAT | O_CLOEXEC;
  buffered_ = sys_open(path_.c_str(), kFlags | O_EXCL, 0666);
  const bool existed = buffered_ == -EEXIST && !options.exclusive;
  if (existed) buffered_ = sys_open(path_.c_str(), kFlags | O_TRUNC, 0666);
  if (buffered_ < 0) throw SystemError("open", -buffered_);
  if (options.num_bytes <= 0) return;
  const int result = sys_allocate(buffered_, options.num_bytes);
  if (result == 0) return;
  if (existed) {
    (void)!::ftruncate(buffered_, 0);
  } else {
    ::unlink(path_.c_str());
  }
  ::close(buffered_);
  throw SystemError("fallocate", -result);
}

void File::open_direct() {
  const DirectAlignment alignment = sys_direct_alignment(buffered_);
  if (alignment.offset == 0) {
    reason_ = "the file system has no direct I/O for this file";
    return;
  }
  direct_ = sys_open(path_.c_str(), (read_only_ ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_DIRECT, 0);
  if (direct_ < 0) {
    reason_ = std::string("open with O_DIRECT: ") + std::strerror(-direct_);
    return;
  }
  struct stat first{}, second{};
  if (::fstat(buffered_, &first) != 0 || ::fstat(direct_, &second) != 0 || first.st_dev != second.st_dev ||
      first.st_ino != second.st_ino) {
    throw SystemError("open", ESTALE);  // somebody replaced the file meanwhile
  }
  // What is read ahead around an edge would be stale as soon as the pages beside it are written directly.
  (void)::posix_fadvise(buffered_, 0, 0, POSIX_FADV_RANDOM);
  memory_alignment_ = std::max<std::size_t>(alignment.memory, 1);
  unit_ = std::max<std::size_t>(alignment.offset, static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)));
  use_direct_ = true;
}

std::int64_t File::num_bytes() const {
  // Also the size of a block device, for which fstat says 0.
  const off_t end = ::lseek(buffered_, 0, SEEK_END);
  if (end < 0) throw SystemError("lseek", errno);
  return end;
}

std::string File::reason() const {
  const std::lock_guard lock(mutex_);
  return reason_;
}

void File::refuse_direct(const std::string& reason) {
  const std::lock_guard lock(mutex_);
  if (reason_.empty()) reason_ = reason;
  use_direct_ = false;
}

const std::string& path_of(const File& file) { return file.path(); }
std::int64_t num_bytes_of(const File& file) { return file.num_bytes(); }
bool is_direct(const File& file) { return file.direct(); }
std::string reason_of(const File& file) { return file.reason(); }
std::size_t offset_alignment_of(const File& file) { return file.unit(); }
std::size_t memory_alignment_of(const File& file) { return file.memory_alignment(); }

}  // namespace ds::io
