// Asynchronous reads and writes of files into and from memory of the caller.
//
// An engine has workers: one thread per io_uring, or threads that call pread and pwrite. An operation, of any
// size, is cut into requests of `block_bytes`, of which `queue_depth` are in flight at once. Memory belongs
// to the caller and has to stay valid until the operation is done, also if nobody waits for it.
//
// [Note: direct I/O and its edges] With O_DIRECT the offset, the size and the address of a request have to be
// aligned. An operation is cut at multiples of the page size (or of the file system's alignment, if that is
// larger): whole pages go through a descriptor with O_DIRECT, what is left at both ends through one without.
// No page is accessed both ways by operations on disjoint ranges, so that such operations may overlap in
// time. (Reading, changing and writing whole blocks would lose one of two concurrent writes to the same
// block.) If only the address is unaligned, requests go through an aligned buffer of the worker.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace ds::io {

enum class Backend { kAuto, kUring, kThreads };

struct Options {
  Backend backend = Backend::kAuto;
  std::size_t block_bytes = std::size_t{1} << 20;  // rounded up to whole pages
  unsigned queue_depth = 32;                       // requests in flight, over all workers
  unsigned num_threads = 0;                        // 0: one io_uring, or eight threads
  bool direct = true;                              // O_DIRECT where the file system has it
  double stall_limit_s = 300;                      // a wait ends if no request has completed for so long
};

struct OpenOptions {
  bool create = false;     // an empty file, also where one exists
  bool exclusive = false;  // with create: a file that exists is an error
  bool read_only = false;
  std::int64_t num_bytes = -1;  // with create: this much room is allocated at once
};

// A call of the system has failed. `call` is its name.
class SystemError : public std::runtime_error {
 public:
  SystemError(std::string call, int code);
  std::string call;
  int code;  // errno
};

struct Failure {
  int code = 0;                  // errno; ENODATA if the file ended early
  std::int64_t offset = 0;       // in the file, of the request that failed
  std::int64_t file_bytes = -1;  // size of a file that ended early
};

class File;       // open as long as somebody holds it
class Operation;  // one read or write
struct State;     // what an engine shares with its workers

enum class Kind { kRead, kWrite };

// The facts of an operation. `failure` is of the first request that failed.
struct Status {
  bool done;
  std::optional<Failure> failure;
  std::int64_t bytes_done;
};

class Engine {
 public:
  // Throws SystemError if the backend is kUring and the system has no io_uring for this process.
  explicit Engine(const Options& options);
  // Closes; what is not done then stays with workers that nobody joins any more.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  Backend backend() const;
  // Why `kAuto` did not choose io_uring; empty if it did.
  const std::string& reason() const { return reason_; }

  std::shared_ptr<File> open(const std::string& path, const OpenOptions& options);
  std::shared_ptr<Operation> submit(Kind kind, std::shared_ptr<File> file, void* data, std::size_t size,
                                    std::int64_t offset);

  // Tells the kernel memory that many operations will use, so that it need not look up its pages for each of
  // them. The memory must stay valid until it is forgotten. Returns why this is not possible, or nothing.
  std::string register_memory(void* data, std::size_t size);
  void forget_memory(void* data);

  // Waits at most `seconds` for the operation (or for all, if null). True if there is nothing left to wait
  // for.
  bool wait(const Operation* operation, double seconds);
  // Likewise for all operations of a file.
  bool wait(const File& file, double seconds);
  // Counts completed requests; constant while nothing moves.
  std::uint64_t progress() const;
  // Operations that failed and have not been looked at since (`status`); they are forgotten by this call.
  std::vector<std::shared_ptr<Operation>> unseen_failures(const File* file);

  // Fails what is not in flight yet with ECANCELED; ends the workers once nothing is in flight. False if
  // something still is.
  bool stop();
  // A child of fork() has no workers: every call of it throws std::logic_error.
  void check_process() const;
  bool in_process_of_creation() const;

 private:
  std::shared_ptr<State> state_;
  std::string reason_;
};

bool is_done(const Operation& operation);
// Whoever asks has seen a failure.
Status status(const Operation& operation);
const File& file_of(const Operation& operation);
Kind kind_of(const Operation& operation);
std::int64_t offset_of(const Operation& operation);
std::size_t size_of(const Operation& operation);

const std::string& path_of(const File& file);
std::int64_t num_bytes_of(const File& file);  // throws SystemError
// Whether O_DIRECT is in use, and if not, why.
bool is_direct(const File& file);
std::string reason_of(const File& file);
std::size_t offset_alignment_of(const File& file);
std::size_t memory_alignment_of(const File& file);

// Whether this process can use io_uring; if not, why.
std::string uring_reason();

}  // namespace ds::io
