#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>

#include "same_host/reduce.h"
#include "same_host/segment.h"

namespace ds::same_host {
namespace {

// Bytes that are read from another process at a time: they stay in the second-level cache until they are
// added.
constexpr std::size_t kChunkBytes = 256 << 10;
// The part of a broadcast that the root writes is a multiple of so many bytes.
constexpr std::size_t kLineBytes = 64;
// Slices of an all-reduce begin at multiples of so many elements, so that no cache line has two owners.
constexpr std::int64_t kSliceElements = 64;

std::uint64_t address_of(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }
const void* pointer_to(std::uint64_t address) { return reinterpret_cast<const void*>(address); }  // NOLINT

struct Range {
  std::int64_t begin, end;
};

Range slice_of(std::int64_t numel, int rank, int size) {
  const std::int64_t blocks = (numel + kSliceElements - 1) / kSliceElements;
  const std::int64_t each = (blocks + size - 1) / size * kSliceElements;
  return {std::min(numel, rank * each), std::min(numel, (rank + 1) * each)};
}

}  // namespace

struct Team::State {
  State(int fd, int rank, std::span<const int> pids, double limit_s) : segment(fd, rank, pids, limit_s) {}

  Segment segment;
  std::mutex mutex;
  std::uint64_t number = 0;  // of the last call
  Result broken;             // the first failure: later calls fail at once
  std::vector<std::byte> scratch;

  int rank() const { return segment.rank(); }
  int size() const { return segment.size(); }
  std::byte* buffer(int of) const { return segment.block(of).buffers[number & 1]; }
  Post& post_of(int of) const { return segment.block(of).posts[number & 1]; }

  // The other ranks, each rank beginning with a different one.
  template <typename Visit>
  Result each_other(Visit visit) const {
    for (int step = 1; step < size(); ++step) {
      const Result result = visit((rank() + step) % size());
      if (result.fault != Fault::kNone) return result;
    }
    return {};
  }

  // Posts the call with its input, and waits until all ranks have posted the same one. Small inputs go into
  // the buffer.
  Result post(const Call& call, const void* source, std::size_t inline_bytes,
              std::span<const std::uint64_t> parts, const Interrupted& interrupted) {
    if (broken.fault != Fault::kNone) return broken;
    if (segment.has_left()) return {Fault::kAborted, rank(), 0, {}};
    ++number;
    Post& own = post_of(rank());
    own.number = number;
    own.call = call;
    own.source = address_of(source);
    std::copy(parts.begin(), parts.end(), own.parts);
    if (inline_bytes > 0) std::memcpy(buffer(rank()), source, inline_bytes);
    segment.publish(number * kSteps + kPosted);
    return each_other([&](int other) -> Result {
      Result result = segment.wait_for(other, number * kSteps + kPosted, interrupted);
      if (result.fault != Fault::kNone) return result;
      if (post_of(other).call != call) return {Fault::kDiffers, other, 0, post_of(other).call};
      return {};
    });
  }

  Result wait_all(std::uint64_t step, const Interrupted& interrupted) const {
    return each_other(
        [&](int other) { return segment.wait_for(other, number * kSteps + step, interrupted); });
  }

  // Tells the others that their inputs are read, and waits until they have read this rank's.
  Result finish(const Interrupted& interrupted) {
    segment.publish(number * kSteps + kRead);
    return wait_all(kRead, interrupted);
  }

  Result read(int from, std::uint64_t address, void* to, std::size_t bytes) const {
    return reached(from, read_memory(segment.pid(from), pointer_to(address), to, bytes));
  }

  Result write(int other, const void* from, std::uint64_t address, std::size_t bytes) const {
    return reached(other,
                   write_memory(segment.pid(other), from, const_cast<void*>(pointer_to(address)), bytes));
  }

  // The result of an access to another rank's memory that gave this error code.
  Result reached(int other, int code) const {
    if (code == 0) return {};
    const Result left = segment.why_left(other);  // and its process may have ended since
    if (left.fault != Fault::kNone) return left;
    return {code == ESRCH ? Fault::kEnded : Fault::kSystem, other, code, {}};
  }

  // Reduces elements [begin, end) of all inputs into `out`; `own` and the posted addresses are those of
  // element 0. With `everywhere` the results also replace these elements of all other inputs.
  Result reduce_range(Range range, const void* own, void* out, Element element, Op op, bool everywhere) {
    const auto width = static_cast<std::int64_t>(size_of(element));
    const std::int64_t step = static_cast<std::int64_t>(kChunkBytes) / width;
    scratch.resize(kChunkBytes * static_cast<std::size_t>(size() - 1));
    std::vector<const void*> parts(static_cast<std::size_t>(size()));
    for (std::int64_t begin = range.begin; begin < range.end; begin += step) {
      const std::int64_t n = std::min(step, range.end - begin);
      std::byte* free = scratch.data();
      parts[static_cast<std::size_t>(rank())] = static_cast<const std::byte*>(own) + begin * width;
      const Result result = each_other([&](int other) {
        parts[static_cast<std::size_t>(other)] = free;
        free += kChunkBytes;
        return read(other, post_of(other).source + static_cast<std::uint64_t>(begin * width),
                    free - kChunkBytes, static_cast<std::size_t>(n * width));
      });
      if (result.fault != Fault::kNone) return result;
      std::byte* const to = static_cast<std::byte*>(out) + (begin - range.begin) * width;
      reduce(parts, n, element, op, to);
      if (!everywhere) continue;
      const Result written = each_other([&](int other) {
        return write(other, to, post_of(other).source + static_cast<std::uint64_t>(begin * width),
                     static_cast<std::size_t>(n * width));
      });
      if (written.fault != Fault::kNone) return written;
    }
    return {};
  }

  // Keeps the first failure, and tells the other ranks that this one will not come any more.
  Result settled(const Result& result) {
    if (result.fault != Fault::kNone && broken.fault == Fault::kNone) {
      broken = result;
      segment.leave(result.fault == Fault::kLeft && result.code >= 0 ? result.code : result.rank);
    }
    return result;
  }
};

Team::Team(int fd, int rank, std::span<const int> pids, double limit_s)
    : state_(std::make_unique<State>(fd, rank, pids, limit_s)) {}
Team::~Team() { state_->segment.leave(-1); }

int Team::rank() const { return state_->rank(); }
int Team::size() const { return state_->size(); }
void Team::leave() { state_->segment.leave(-1); }

Result Team::barrier(const Interrupted& interrupted) {
  const std::scoped_lock lock(state_->mutex);
  return state_->settled(state_->post({}, nullptr, 0, {}, interrupted));
}

Result Team::all_reduce(void* data, std::int64_t numel, Element element, Op op,
                        const Interrupted& interrupted) {
  State& s = *state_;
  const std::scoped_lock lock(s.mutex);
  const auto width = static_cast<std::int64_t>(size_of(element));
  const auto bytes = static_cast<std::size_t>(numel * width);
  const bool small = bytes <= kInlineBytes;
  const Call call{Kind::kAllReduce, element, op, 0, bytes};
  Result result = s.post(call, data, small ? bytes : 0, {}, interrupted);
  if (result.fault != Fault::kNone) return s.settled(result);
  if (small) {
    std::vector<const void*> parts;
    for (int rank = 0; rank < s.size(); ++rank) parts.push_back(s.buffer(rank));
    reduce(parts, numel, element, op, data);
    return {};
  }
  // Each rank reduces a slice of all tensors, which nobody else reads, and writes the results to all of them
  // while they are in its caches: reading them later would move them through the memory once more.
  const Range own = slice_of(numel, s.rank(), s.size());
  result = s.reduce_range(own, data, static_cast<std::byte*>(data) + own.begin * width, element, op, true);
  return s.settled(result.fault != Fault::kNone ? result : s.finish(interrupted));
}

Result Team::reduce_scatter(void* out, const void* in, std::int64_t numel, Element element, Op op,
                            const Interrupted& interrupted) {
  State& s = *state_;
  const std::scoped_lock lock(s.mutex);
  const auto width = static_cast<std::int64_t>(size_of(element));
  const auto bytes = static_cast<std::size_t>(numel * width * s.size());
  const bool small = bytes <= kInlineBytes;
  const Call call{Kind::kReduceScatter, element, op, 0, bytes};
  const Result result = s.post(call, in, small ? bytes : 0, {}, interrupted);
  if (result.fault != Fault::kNone) return s.settled(result);
  const Range own{s.rank() * numel, (s.rank() + 1) * numel};
  if (small) {
    std::vector<const void*> parts;
    for (int rank = 0; rank < s.size(); ++rank) parts.push_back(s.buffer(rank) + own.begin * width);
    reduce(parts, numel, element, op, out);
    return {};
  }
  const Result reduced = s.reduce_range(own, in, out, element, op, false);
  return s.settled(reduced.fault != Fault::kNone ? reduced : s.finish(interrupted));
}

Result Team::all_gather(void* out, const void* in, std::span<const std::uint64_t> sizes,
                        const Interrupted& interrupted) {
  State& s = *state_;
  const std::scoped_lock lock(s.mutex);
  const auto own_bytes = static_cast<std::size_t>(sizes[static_cast<std::size_t>(s.rank())]);
  const std::uint64_t total = std::accumulate(sizes.begin(), sizes.end(), std::uint64_t{0});
  const bool small = *std::max_element(sizes.begin(), sizes.end()) <= kInlineBytes;
  const Call call{Kind::kAllGather, Element::kByte, Op::kSum, 0, total};
  const std::uint64_t parts[] = {own_bytes};
  Result result = s.post(call, in, small ? own_bytes : 0, parts, interrupted);
  if (result.fault != Fault::kNone) return s.settled(result);
  auto* first = static_cast<std::byte*>(out);
  const auto place_of = [&](int rank) {
    return first + std::accumulate(sizes.begin(), sizes.begin() + rank, std::uint64_t{0});
  };
  if (place_of(s.rank()) != in) std::memmove(place_of(s.rank()), in, own_bytes);
  result = s.each_other([&](int other) -> Result {
    const auto bytes = static_cast<std::size_t>(sizes[static_cast<std::size_t>(other)]);
    const std::uint64_t sent = s.post_of(other).parts[0];
    if (sent != bytes)
      return {Fault::kDiffers, other, 0, {Kind::kAllGather, Element::kByte, Op::kSum, 0, sent}};
    if (!small) return s.read(other, s.post_of(other).source, place_of(other), bytes);
    std::memcpy(place_of(other), s.buffer(other), bytes);
    return {};
  });
  if (result.fault != Fault::kNone || small) return s.settled(result);
  return s.settled(s.finish(interrupted));
}

Result Team::broadcast(void* data, std::size_t bytes, int root, const Interrupted& interrupted) {
  State& s = *state_;
  const std::scoped_lock lock(s.mutex);
  const bool small = bytes <= kInlineBytes, is_root = s.rank() == root;
  const Call call{Kind::kBroadcast, Element::kByte, Op::kSum, static_cast<std::uint32_t>(root), bytes};
  const Result result = s.post(call, data, small && is_root ? bytes : 0, {}, interrupted);
  if (result.fault != Fault::kNone) return s.settled(result);
  if (small) {
    if (!is_root) std::memcpy(data, s.buffer(root), bytes);
    return {};
  }
  // The root would only wait: it writes the last 1 / N of every copy, and the others read the rest. So all N
  // ranks move as many bytes.
  const std::size_t written = bytes / static_cast<std::size_t>(s.size()) / kLineBytes * kLineBytes;
  const std::size_t read = bytes - written;
  const auto* first = static_cast<std::byte*>(data);
  const Result moved = is_root ? s.each_other([&](int other) {
    return s.write(other, first + read, s.post_of(other).source + read, written);
  })
                               : s.read(root, s.post_of(root).source, data, read);
  if (moved.fault != Fault::kNone) return s.settled(moved);
  return s.settled(s.finish(interrupted));
}

Result Team::all_to_all(void* out, std::span<const std::uint64_t> out_sizes, const void* in,
                        std::span<const std::uint64_t> in_sizes, const Interrupted& interrupted) {
  State& s = *state_;
  const std::scoped_lock lock(s.mutex);
  const std::uint64_t total = std::accumulate(in_sizes.begin(), in_sizes.end(), std::uint64_t{0});
  const bool small = total <= kInlineBytes;  // of this rank: `parts` tell the others
  const Call call{Kind::kAllToAll, Element::kByte, Op::kSum, 0, 0};
  Result result = s.post(call, in, small ? total : 0, in_sizes, interrupted);
  if (result.fault != Fault::kNone) return s.settled(result);
  auto* to = static_cast<std::byte*>(out);
  bool any_large = !small;  // the same on all ranks, which all see the posts of all
  for (int from = 0; from < s.size(); ++from) {
    const Post& theirs = s.post_of(from);
    const std::uint64_t* parts = theirs.parts;
    const std::uint64_t begin = std::accumulate(parts, parts + s.rank(), std::uint64_t{0});
    const std::uint64_t bytes = parts[s.rank()],
                        all = std::accumulate(parts, parts + s.size(), std::uint64_t{0});
    any_large |= all > kInlineBytes;
    if (bytes != out_sizes[static_cast<std::size_t>(from)]) {
      return s.settled({Fault::kDiffers, from, 0, {Kind::kAllToAll, Element::kByte, Op::kSum, 0, bytes}});
    }
    if (from == s.rank()) {
      std::memcpy(to, static_cast<const std::byte*>(in) + begin, bytes);
    } else if (all <= kInlineBytes) {
      std::memcpy(to, s.buffer(from) + begin, bytes);
    } else if (bytes > 0) {
      result = s.read(from, theirs.source + begin, to, bytes);
      if (result.fault != Fault::kNone) return s.settled(result);
    }
    to += bytes;
  }
  return any_large ? s.settled(s.finish(interrupted)) : Result{};
}

}  // namespace ds::same_host
