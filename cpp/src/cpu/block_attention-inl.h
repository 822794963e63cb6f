// One block row of block-sparse attention. Included by kernels-inl.h.
//
// [Note: one row of blocks] Scores of a block, s = q k^T, are computed into a tile that stays in the cache.
// Forward keeps the maximum m and the sum l of exp(s - m) of each query, and rescales what it has when the
// maximum grows. Backward recomputes the weights p = exp(s - lse); with d = rowsum(grad out):
//   dv += p^T grad,  ds = p (grad v^T - d),  dq += ds k,  dk += ds^T q
// k^T and v^T of each block come packed as (dim, block), so that every product has the form C += A B with
// rows of B in memory order, and elements of A that are broadcast.

// A tile of kRows x (kVectors vectors): the sums stay in registers over all of `depth`.
template <int kRows, int kVectors>
DS_INLINE void product_tile(const float* a, std::int64_t a_row, std::int64_t a_col, const float* b,
                            std::int64_t b_row, float* c, std::int64_t c_row, std::int64_t depth, bool add) {
  F32 sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sum[i][j] = add ? load(c + i * c_row + j * kLanes) : set(0.0f);
  }
  for (std::int64_t p = 0; p < depth; ++p) {
    F32 row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + p * b_row + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const F32 x = set(a[i * a_row + p * a_col]);
      for (int j = 0; j < kVectors; ++j) sum[i][j] = fused(x, row[j], sum[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) store(c + i * c_row + j * kLanes, sum[i][j]);
  }
}

// C (m x n) = or += A (m x depth, any strides) B (depth x n). m is a multiple of 4, n of 16.
inline void product(const float* a, std::int64_t a_row, std::int64_t a_col, const float* b,
                    std::int64_t b_row, float* c, std::int64_t c_row, std::int64_t m, std::int64_t n,
                    std::int64_t depth, bool add) {
  constexpr int kVectors = kLanes == 16 ? 4 : 2;
  constexpr std::int64_t kWide = kVectors * kLanes;
  std::int64_t j = 0;
  for (; j + kWide <= n; j += kWide) {
    for (std::int64_t i = 0; i < m; i += 4) {
      product_tile<4, kVectors>(a + i * a_row, a_row, a_col, b + j, b_row, c + i * c_row + j, c_row, depth,
                                add);
    }
  }
  for (; j < n; j += kLanes) {
    for (std::int64_t i = 0; i < m; i += 4) {
      product_tile<4, 1>(a + i * a_row, a_row, a_col, b + j, b_row, c + i * c_row + j, c_row, depth, add);
    }
  }
}

// exp(x) for x <= 0, to about 2 units in the last place; below -87 about 1e-38.
DS_INLINE F32 exp_negative(F32 x) {
  const F32 least = set(-87.0f);
  x = largest(x, least);
  // Adding 1.5 * 2^23 rounds to an integer, which then is in the low bits.
  const F32 magic = set(12582912.0f);
  const F32 shifted = fused(x, set(1.44269504088896341f), magic);
  const F32 n = shifted - magic;
  F32 r = fused(n, set(-0.693359375f), x);
  r = fused(n, set(2.12194440e-4f), r);
  F32 p = set(1.9875691500e-4f);
  p = fused(p, r, set(1.3981999507e-3f));
  p = fused(p, r, set(8.3334519073e-3f));
  p = fused(p, r, set(4.1665795894e-2f));
  p = fused(p, r, set(1.6666665459e-1f));
  p = fused(p, r, set(5.0000001201e-1f));
  p = fused(p * r, r, r + set(1.0f));
  return float_of(bits_of(p) + left<23>(bits_of(shifted)));
}

DS_INLINE float sum_of_lanes(F32 a) {
  float lanes[kLanes];
  store(lanes, a);
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

DS_INLINE float largest_of_lanes(F32 a) {
  float lanes[kLanes];
  store(lanes, a);
  float most = lanes[0];
  for (int i = 1; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// What is added to a score that does not count: finite, so that a row without keys is no NaN.
inline constexpr float kNoScore = -1e30f;

// Scores of one block: scaled, biased and masked. tile: (block, block).
inline void block_scores(const BlockAttention& job, const float* q, const float* kt, const float* bias,
                         bool diagonal, float* tile) {
  const std::int64_t size = job.block;
  product(q, job.dim, 1, kt, size, tile, size, size, size, job.dim, false);
  const F32 scale = set(job.scale);
  for (std::int64_t i = 0; i < size; ++i) {
    float* row = tile + i * size;
    for (std::int64_t j = 0; j < size; j += kLanes) {
      F32 x = load(row + j) * scale;
      if (bias != nullptr) x = x + load(bias + j);
      store(row + j, x);
    }
    if (diagonal) {
      for (std::int64_t j = i + 1; j < size; ++j) row[j] = kNoScore;
    }
  }
}

// scratch: block * block + 2 * block floats.
void block_attention_row(const BlockAttention& job, const BlockAttentionRow& at, float* out, float* lse,
                         float* scratch) {
  const std::int64_t size = job.block, dim = job.dim;
  float* tile = scratch;
  float* most = tile + size * size;
  float* sums = most + size;
  for (std::int64_t i = 0; i < size; ++i) {
    most[i] = kNoScore * 2.0f;
    sums[i] = 0.0f;
  }
  for (std::int64_t i = 0; i < size * dim; i += kLanes) store(out + i, set(0.0f));
  for (std::int64_t c = 0; c < at.num_columns; ++c) {
    const std::int64_t column = at.columns[c];
    const float* bias = at.bias == nullptr ? nullptr : at.bias + column * size;
    block_scores(job, at.q, at.kt + column * size * dim, bias, job.causal && column == at.row, tile);
    for (std::int64_t i = 0; i < size; ++i) {
      float* row = tile + i * size;
      F32 high = load(row);
      for (std::int64_t j = kLanes; j < size; j += kLanes) high = largest(high, load(row + j));
      const float before = most[i], now = largest_of_lanes(high);
      if (now > before) {
        most[i] = now;
        if (c > 0) {
          float factor[kLanes];
          store(factor, exp_negative(set(before - now)));
          sums[i] *= factor[0];
          const F32 f = set(factor[0]);
          for (std::int64_t d = 0; d < dim; d += kLanes)
            store(out + i * dim + d, load(out + i * dim + d) * f);
        }
      }
      const F32 m = set(most[i]);
      F32 total = set(0.0f);
      for (std::int64_t j = 0; j < size; j += kLanes) {
        const F32 p = exp_negative(load(row + j) - m);
        total = total + p;
        store(row + j, p);
      }
      sums[i] += sum_of_lanes(total);
    }
    product(tile, size, 1, at.v + column * size * dim, dim, out, dim, size, dim, size, true);
  }
  for (std::int64_t i = 0; i < size; ++i) {
    const F32 inverse = set(1.0f / sums[i]);
    for (std::int64_t d = 0; d < dim; d += kLanes)
      store(out + i * dim + d, load(out + i * dim + d) * inverse);
    lse[i] = most[i];
    sums[i] = 1.0f / sums[i];
  }
  // lse = m + log(l); sums has 1 / l, since there is no vector logarithm here: the caller takes it.
  for (std::int64_t i = 0; i < size; ++i) at.inverse_sums[i] = sums[i];
}

// scratch: 2 * block * block + block floats. Adds to dk and dv.
void block_attention_row_backward(const BlockAttention& job, const BlockAttentionRow& at,
                                  const BlockAttentionRowGrads& g, float* scratch) {
  const std::int64_t size = job.block, dim = job.dim;
  float* p = scratch;
  float* ds = p + size * size;
  float* delta = ds + size * size;
  for (std::int64_t i = 0; i < size; ++i) {
    F32 sum = set(0.0f);
    for (std::int64_t d = 0; d < dim; d += kLanes) {
      sum = fused(load(g.grad + i * dim + d), load(g.out + i * dim + d), sum);
    }
    delta[i] = sum_of_lanes(sum);
  }
  for (std::int64_t i = 0; i < size * dim; i += kLanes) store(g.dq + i, set(0.0f));
  for (std::int64_t c = 0; c < at.num_columns; ++c) {
    const std::int64_t column = at.columns[c], start = column * size * dim;
    const float* bias = at.bias == nullptr ? nullptr : at.bias + column * size;
    block_scores(job, at.q, at.kt + start, bias, job.causal && column == at.row, p);
    product(g.grad, dim, 1, g.vt + start, size, ds, size, size, size, dim, false);
    const F32 scale = set(job.scale);
    for (std::int64_t i = 0; i < size; ++i) {
      const F32 lse = set(g.lse[i]), d = set(delta[i]);
      for (std::int64_t j = 0; j < size; j += kLanes) {
        const F32 weight = exp_negative(load(p + i * size + j) - lse);
        store(p + i * size + j, weight);
        store(ds + i * size + j, weight * (load(ds + i * size + j) - d) * scale);
      }
    }
    product(p, 1, size, g.grad, dim, g.dv + start, dim, size, dim, size, true);
    product(ds, size, 1, g.k + start, dim, g.dq, dim, size, dim, size, true);
    product(ds, 1, size, at.q, dim, g.dk + start, dim, size, dim, size, true);
  }
}
