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

// Calls step(pointers...) for each group of kLanes elements.
template <class Step, class... T>
inline void sweep(std::int64_t numel, Step step, T*... pointers) {
  std::int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) step(advance(pointers, i)...);
  if (i < numel) staged_step(step, Staged<T>(advance(pointers, i), numel - i)...);
}
