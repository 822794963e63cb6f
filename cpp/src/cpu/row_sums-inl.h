// One sum of rows and its gradient, see ds/row_sums.h. Included by kernels-inl.h.

template <class T>
inline float element(const T* x) {
  float lanes[kLanes];
  T padded[kLanes] = {};
  padded[0] = *x;
  store(lanes, load(padded));
  return lanes[0];
}
inline float element(const float* x) { return *x; }

template <class T>
inline void put_element(T* out, float x) {
  T lanes[kLanes];
  store(lanes, set(x));
  *out = lanes[0];
}

template <class T>
void row_sum(const RowSums& job, const void* rows, const void* weights, std::int64_t s, void* out) {
  const std::int64_t* index = job.index + s * job.choices;
  T* to = static_cast<T*>(out) + s * job.columns;
  for (std::int64_t j = 0; j < job.columns; j += kLanes) {
    F32 sum = set(0.0f);
    for (std::int64_t k = 0; k < job.choices; ++k) {
      if (index[k] == job.num_rows) continue;
      const F32 row = load(static_cast<const T*>(rows) + index[k] * job.columns + j);
      if (weights == nullptr) {
        sum = sum + row;
      } else {
        sum = fused(set(element(static_cast<const T*>(weights) + s * job.choices + k)), row, sum);
      }
    }
    store(to + j, sum);
  }
}

template <class T>
void row_sum_grad(const RowSums& job, const RowSumGrads& g, std::int64_t s) {
  const T* grad = static_cast<const T*>(g.grad) + s * job.columns;
  for (std::int64_t k = 0; k < job.choices; ++k) {
    const std::int64_t choice = s * job.choices + k, at = job.index[choice] * job.columns;
    T* product = static_cast<T*>(g.dweights) + choice;
    if (job.index[choice] == job.num_rows) {
      put_element(product, 0.0f);
      continue;
    }
    const F32 weight = set(element(static_cast<const T*>(g.weights) + choice));
    const T* row = static_cast<const T*>(g.rows) + at;
    T* drow = static_cast<T*>(g.drows) + at;
    F32 sums[16 / kLanes];
    for (F32& sum : sums) sum = set(0.0f);
    for (std::int64_t j = 0; j < job.columns; j += 16) {
      for (int i = 0; i < 16 / kLanes; ++i) {
        const F32 x = load(grad + j + i * kLanes);
        sums[i] = fused(x, load(row + j + i * kLanes), sums[i]);
        store(drow + j + i * kLanes, weight * x);
      }
    }
    float lanes[16];
    for (int i = 0; i < 16 / kLanes; ++i) store(lanes + i * kLanes, sums[i]);
    float total = 0.0f;
    for (const float lane : lanes) total += lane;
    put_element(product, total);
  }
}
