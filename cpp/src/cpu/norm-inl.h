// Sums of squares. Included per target.
//
// [Note: sums in fixed order] Element i is added to accumulator i % 16, and the 16 accumulators are added as
// a binary tree. The square of an fp32 number is exact in fp64. So the order of additions and the result are
// the same on every target.

inline double tree_sum(const Sum16& sum) {
  double lane[16];
  store16(lane, sum);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// Calls add(group) for groups of 16 elements, the last one filled up with zeros.
template <class T, class Add>
inline void by_sixteen(const T* x, std::int64_t numel, Add add) {
  std::int64_t i = 0;
  for (; i + 16 <= numel; i += 16) add(x + i);
  if (i < numel) {
    T tail[16] = {};
    for (std::int64_t j = 0; i + j < numel; ++j) tail[j] = x[i + j];
    add(static_cast<const T*>(tail));
  }
}

// numel is a multiple of 16, except for the last call with one sum.
template <class T>
inline void sum_squares_into(Sum16& sum, const T* x, std::int64_t numel) {
  by_sixteen(x, numel, [&](const T* group) { add_squares(sum, widen16(group)); });
}

template <class T>
double sum_squares(const void* data, std::int64_t numel) {
  Sum16 sum = zero16();
  sum_squares_into(sum, static_cast<const T*>(data), numel);
  return tree_sum(sum);
}
