// Loops over arrays in vectors of kLanes elements, with the same arithmetic for all elements. Included per
// target.
//
// [Note: tails] The last elements of an array, if fewer than kLanes, are copied to a buffer of kLanes
// elements, processed by the vector code, and copied back. So the result of an element does not depend on its
// position in a tensor.

// The element type of an optional array that is missing: reads give zeros, writes have no effect.
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

// [Note: prefetch] An optimizer step reads up to five arrays at once. Square roots and divisions fill the
// processor's reorder buffer, so that it loads only a few cache lines ahead. Prefetching kAhead elements
// ahead makes steps that are limited by memory bandwidth 3 to 5 % faster, and does not slow down others. A
// larger distance is slower.
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
