#include "ds/io.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "io/ring.h"
#include "io/system.h"

using namespace ds;
using namespace ds::io;

namespace {

constexpr double kLong = 60;

std::vector<Backend> backends() {
  if (uring_reason().empty()) return {Backend::kUring, Backend::kThreads};
  std::printf("without io_uring: %s\n", uring_reason().c_str());
  return {Backend::kThreads};
}

// A file in the working directory, which ctest puts into the build folder: on a real file system, mostly.
class Folder {
 public:
  Folder() : path_("io_test_" + std::to_string(::getpid())) {}
  ~Folder() { ::unlink(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::vector<unsigned char> pattern(std::size_t size, unsigned seed) {
  std::vector<unsigned char> bytes(size);
  for (std::size_t i = 0; i < size; ++i)
    bytes[i] = static_cast<unsigned char>((i * 2654435761u + seed) >> 11);
  return bytes;
}

OpenOptions created(std::int64_t num_bytes = -1) {
  OpenOptions options;
  options.create = true;
  options.num_bytes = num_bytes;
  return options;
}

Options small(Backend backend) {
  Options options;
  options.backend = backend;
  options.block_bytes = 8192;
  options.queue_depth = 4;
  return options;
}

void clear_faults() { set_faults({}); }

}  // namespace

TEST(bytes_come_back_from_any_offset_and_address) {
  for (const Backend backend : backends()) {
    const Folder folder;
    Engine engine(small(backend));
    const auto file = engine.open(folder.path(), created(100'000));
    CHECK_EQ(num_bytes_of(*file), 100'000);
    for (const std::size_t size : {1u, 511u, 4096u, 4097u, 20'000u, 65'536u}) {
      for (const std::int64_t offset : {0, 1, 4095, 4096, 8191, 30'000}) {
        for (const std::size_t shift : {0u, 1u, 64u}) {
          const auto source = pattern(size + shift, static_cast<unsigned>(size) + 7);
          std::vector<unsigned char> out(size + shift);
          void* const from = const_cast<unsigned char*>(source.data()) + shift;
          const auto write = engine.submit(Kind::kWrite, file, from, size, offset);
          CHECK(engine.wait(write.get(), kLong));
          CHECK(!status(*write).failure);
          CHECK_EQ(status(*write).bytes_done, static_cast<std::int64_t>(size));
          const auto read = engine.submit(Kind::kRead, file, out.data() + shift, size, offset);
          CHECK(engine.wait(read.get(), kLong));
          CHECK(std::memcmp(from, out.data() + shift, size) == 0);
        }
      }
    }
  }
}

TEST(whole_pages_of_aligned_memory_go_directly) {
  for (const Backend backend : backends()) {
    const Folder folder;
    Engine engine(small(backend));
    const auto file = engine.open(folder.path(), created(65'536));
    if (!is_direct(*file)) {
      std::printf("no direct I/O: %s\n", reason_of(*file).c_str());
      return;
    }
    void* const memory = ::mmap(nullptr, 65'536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    std::memset(memory, 3, 65'536);
    CHECK(engine.wait(engine.submit(Kind::kWrite, file, memory, 65'536, 0).get(), kLong));
    // Nothing of it is in the page cache.
    const int fd = ::open(folder.path().c_str(), O_RDONLY);
    void* const mapped = ::mmap(nullptr, 65'536, PROT_READ, MAP_SHARED, fd, 0);
    unsigned char resident[16] = {};
    CHECK_EQ(::mincore(mapped, 65'536, resident), 0);
    for (const unsigned char page : resident) CHECK_EQ(page & 1, 0);
    ::munmap(mapped, 65'536);
    ::munmap(memory, 65'536);
    ::close(fd);
  }
}

TEST(partial_transfers_and_interruptions_go_on) {
  for (const Backend backend : backends()) {
    const Folder folder;
    Engine engine(small(backend));
    const auto file = engine.open(folder.path(), created());
    const auto source = pattern(50'000, 1);
    std::vector<unsigned char> out(source.size());
    set_faults({{Call::kWrite, 0, -1, 0, 1000, false},
                {Call::kRead, 0, 9, EINTR, -1, false},
                {Call::kUringEnter, 1, 7, EINTR, -1, false}});
    CHECK(engine.wait(
        engine.submit(Kind::kWrite, file, const_cast<unsigned char*>(source.data()), source.size(), 3).get(),
        kLong));
    CHECK(engine.wait(engine.submit(Kind::kRead, file, out.data(), out.size(), 3).get(), kLong));
    clear_faults();
    CHECK(out == source);
  }
}

TEST(a_failure_ends_the_operation_and_nothing_else) {
  for (const Backend backend : backends()) {
    const Folder folder;
    Engine engine(small(backend));
    const auto file = engine.open(folder.path(), created());
    auto bytes = pattern(50'000, 1);
    set_faults({{Call::kWrite, 2, 1, EIO, -1, false}});
    const auto bad = engine.submit(Kind::kWrite, file, bytes.data(), bytes.size(), 100);
    CHECK(engine.wait(bad.get(), kLong));
    const auto unseen = engine.unseen_failures(file.get());
    CHECK_EQ(unseen.size(), 1u);
    CHECK(engine.unseen_failures(nullptr).empty());
    const auto failure = status(*bad).failure;
    CHECK(failure.has_value());
    CHECK_EQ(failure->code, EIO);
    CHECK(failure->offset >= 100);
    CHECK(status(*bad).bytes_done < 50'000);
    const auto good = engine.submit(Kind::kWrite, file, bytes.data(), bytes.size(), 100);
    CHECK(engine.wait(good.get(), kLong));
    CHECK(!status(*good).failure);
    const auto beyond = engine.submit(Kind::kRead, file, bytes.data(), bytes.size(), 101);
    CHECK(engine.wait(beyond.get(), kLong));
    CHECK_EQ(status(*beyond).failure->code, ENODATA);
    CHECK_EQ(status(*beyond).failure->file_bytes, 50'100);
    CHECK_EQ(status(*beyond).bytes_done, 49'999);
  }
}

TEST(a_refused_request_is_not_repeated_for_ever) {
  for (const Backend backend : backends()) {
    const Folder folder;
    Options options = small(backend);
    options.stall_limit_s = 0.05;
    Engine engine(options);
    const auto file = engine.open(folder.path(), created());
    auto bytes = pattern(100, 1);
    set_faults({{Call::kWrite, 0, -1, EAGAIN, -1, false}});
    const auto operation = engine.submit(Kind::kWrite, file, bytes.data(), bytes.size(), 0);
    CHECK(engine.wait(operation.get(), kLong));
    clear_faults();
    CHECK_EQ(status(*operation).failure->code, EAGAIN);
  }
}

TEST(stopping_cancels_what_has_not_begun) {
  for (const Backend backend : backends()) {
    const Folder folder;
    Options options = small(backend);
    options.num_threads = 1;
    options.queue_depth = 1;
    Engine engine(options);
    const auto file = engine.open(folder.path(), created());
    auto bytes = pattern(8192, 1);
    set_faults({{Call::kWrite, 0, -1, 0, -1, true}});
    const auto running = engine.submit(Kind::kWrite, file, bytes.data(), bytes.size(), 0);
    const auto waiting = engine.submit(Kind::kWrite, file, bytes.data(), bytes.size(), 8192);
    CHECK(!engine.wait(nullptr, 0.05));
    CHECK(!engine.stop());
    CHECK_EQ(status(*waiting).failure->code, ECANCELED);
    CHECK(!status(*running).done);
    CHECK_THROWS(std::logic_error, "closed", engine.submit(Kind::kRead, file, bytes.data(), 1, 0));
    clear_faults();
    CHECK(engine.wait(*file, kLong));
    CHECK(!status(*running).failure);
  }
}

TEST(registered_memory_is_used_and_forgotten) {
  if (!uring_reason().empty()) return;
  const Folder folder;
  Engine engine(small(Backend::kUring));
  const auto file = engine.open(folder.path(), created(65'536));
  constexpr std::size_t kSize = 65'536;
  void* const memory = ::mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  std::memset(memory, 9, kSize);
  const std::string reason = engine.register_memory(memory, kSize);
  if (!reason.empty()) std::printf("not registered: %s\n", reason.c_str());
  for (int round = 0; round < 2; ++round) {
    const auto write = engine.submit(Kind::kWrite, file, memory, kSize, 0);
    CHECK(engine.wait(write.get(), kLong));
    CHECK(!status(*write).failure);
    engine.forget_memory(memory);
  }
  ::munmap(memory, kSize);
}

TEST(errors_of_opening) {
  const Folder folder;
  Engine engine(small(Backend::kThreads));
  CHECK_THROWS(SystemError, "No such file", engine.open("/nowhere/at/all", created()));
  CHECK_THROWS(SystemError, "Is a directory", engine.open("/tmp", OpenOptions{}));
  OpenOptions reading;
  reading.read_only = true;
  CHECK_THROWS(SystemError, "Illegal seek", engine.open("/dev/null", reading));
  set_faults({{Call::kUringSetup, 0, -1, EPERM, -1, false}});
  CHECK_THROWS(SystemError, "io_uring_setup", Engine(small(Backend::kUring)));
  Options automatic = small(Backend::kAuto);
  Engine fallen_back(automatic);
  clear_faults();
  CHECK(fallen_back.backend() == Backend::kThreads);
  CHECK(fallen_back.reason().find("seccomp") != std::string::npos);
}
