// Walking arrays vector by vector, bodies and tails with the same arithmetic. Included per target.
//
// [Note: tails] A tail of fewer than kLanes elements is copied into a buffer of kLanes, goes through the
// vector code, and is copied back. So an element's bits never depend on its place in a tensor.

// The element type of an array that is not there: reads as zeros, writes go nowhere.
struct Absent {};
inline F32 load(const Absent*) { return set(0.0f); }
inline void store(Absent*, F32) {}

template <class T>
inline T* advance(T* pointer, std::int64_t numel) {
  return pointer + numel;
}
inline Absent* advance(Absent*, std::int64_t) { return nullptr; }

template <class T>
struct Staged {
  T data[kLanes];
  T* origin;
  std::int64_t numel;
  Staged(T* from, std::int64_t n) : data{}, origin(from), numel(n) {
    for (std::int64_t i = 0; i < n; ++i) data[i] = from[i];
  }
  ~Staged() {
    for (std::int64_t i = 0; i < numel; ++i) origin[i] = data[i];
  }
  T* get() { return data; }
};
template <class T>
struct Staged<const T> {
  T data[kLanes];
  Staged(const T* from, std::int64_t n) : data{} {
    for (std::int64_t i = 0; i < n; ++i) data[i] = from[i];
  }
  const T* get() const { return data; }
};
template <>
struct Staged<Absent> {
  Staged(Absent*, std::int64_t) {}
  Absent* get() { return nullptr; }
};

template <class Step, class... T>
inline void staged_step(Step step, Staged<T>... staged) {
  step(staged.get()...);
}

// [Note: prefetch] An optimizer step walks up to five arrays at once, and a square root or a division keeps
// the window of instructions in flight short: some lines ahead at most. Asking for lines kAhead elements
// ahead is worth 3 to 5 % where memory is the limit, and costs nothing where it is not. Further ahead is
// slower.
constexpr std::int64_t kLine = 16;
constexpr std::int64_t kAhead = 256;
template <class T>
inline void prefetch(T* pointer) {
  __builtin_prefetch(pointer);
}
inline void prefetch(Absent*) {}

// Calls step(pointers...) for each group of kLanes elements.
template <class Step, class... T>
inline void sweep(std::int64_t numel, Step step, T*... pointers) {
  std::int64_t i = 0;
  for (; i + kLine <= numel; i += kLine) {
    (prefetch(advance(pointers, i + kAhead)), ...);
    for (std::int64_t k = i; k < i + kLine; k += kLanes) step(advance(pointers, k)...);
  }
  for (; i < numel; i += kLanes) {
    staged_step(step, Staged<T>(advance(pointers, i), numel - i < kLanes ? numel - i : kLanes)...);
  }
}
