// A file that is open once or twice: without O_DIRECT, and with it where that works.
#pragma once

#include <atomic>
#include <mutex>
#include <string>

#include "ds/io.h"

namespace ds::io {

class File {
 public:
  // Throws SystemError. A file that this created is removed again if there is no room for it.
  File(std::string path, const OpenOptions& options, bool direct);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int fd(bool direct) const { return direct ? direct_ : buffered_; }
  const std::string& path() const { return path_; }
  std::int64_t num_bytes() const;
  bool read_only() const { return read_only_; }
  bool direct() const { return use_direct_.load(std::memory_order_relaxed); }
  std::string reason() const;
  std::size_t memory_alignment() const { return memory_alignment_; }
  // Operations are cut at multiples of this.
  std::size_t unit() const { return unit_; }

  // From now on, everything goes without O_DIRECT.
  void refuse_direct(const std::string& reason);

 private:
  void create(const OpenOptions& options);
  void open_direct();

  std::string path_;
  bool read_only_;
  int buffered_ = -1;
  int direct_ = -1;
  std::atomic<bool> use_direct_{false};
  std::size_t memory_alignment_ = 1;
  std::size_t unit_ = 1;
  mutable std::mutex mutex_;
  std::string reason_;
};

}  // namespace ds::io
