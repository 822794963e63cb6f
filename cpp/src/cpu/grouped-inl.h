// Panels of grouped products; see [Note: order of sums of grouped products] in ds/grouped.h. Included by
// kernels-inl.h.
//
// [Note: a panel of a product] B is copied to a panel of at most 64 columns in fp32, whose rows follow each
// other, and which stays in the second-level cache while all rows of A pass by. A tile of 6 rows by 4 vectors
// (2 with fewer registers) keeps its sums in registers over the whole depth: for each step 4 vectors of B and
// 6 broadcast elements of A are read for 24 multiply-adds. A small fp32 matrix is read where it is.

// Rows of A that are widened at once.
inline constexpr std::int64_t kStrip = 12;
inline constexpr int kTileVectors = kLanes == 16 ? 4 : 2;
// Rows longer than this, in elements, lie in memory such that a column of them falls on few sets of the
// cache.
inline constexpr std::int64_t kShortRow = 256;

// A tile of kRows x (kVectors vectors) of C = init + A B.
template <int kRows, int kVectors, class T>
DS_INLINE void grouped_tile(const float* a, std::int64_t a_row, std::int64_t a_col, const float* b,
                            std::int64_t b_row, const float* init, T* c, std::int64_t c_row,
                            std::int64_t depth) {
  F32 sum[kRows][kVectors];
  for (int j = 0; j < kVectors; ++j) {
    const F32 first = init == nullptr ? set(0.0f) : load(init + j * kLanes);
    for (int i = 0; i < kRows; ++i) sum[i][j] = first;
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

// kRows rows of C, by all columns of the panel.
template <int kRows, int kVectors, class T>
inline void grouped_rows(const float* a, std::int64_t a_row, std::int64_t a_col, const float* b,
                         std::int64_t b_row, const float* init, T* c, std::int64_t c_row,
                         std::int64_t columns, std::int64_t depth) {
  std::int64_t j = 0;
  const auto start = [&] { return init == nullptr ? nullptr : init + j; };
  for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes) {
    grouped_tile<kRows, kVectors>(a, a_row, a_col, b + j, b_row, start(), c + j, c_row, depth);
  }
  if (columns - j >= 2 * kLanes) {
    grouped_tile<kRows, 2>(a, a_row, a_col, b + j, b_row, start(), c + j, c_row, depth);
    j += 2 * kLanes;
  }
  if (columns - j >= kLanes) {
    grouped_tile<kRows, 1>(a, a_row, a_col, b + j, b_row, start(), c + j, c_row, depth);
  }
}

// All rows of a C; in a narrow panel, tiles have more rows, so that as many sums are in registers.
template <class T>
inline void grouped_columns(std::int64_t rows, const float* a, std::int64_t a_row, std::int64_t a_col,
                            const float* b, std::int64_t b_row, const float* init, T* c, std::int64_t c_row,
                            std::int64_t columns, std::int64_t depth) {
  const auto take = [&]<int kRows, int kVectors>() {
    grouped_rows<kRows, kVectors>(a, a_row, a_col, b, b_row, init, c, c_row, columns, depth);
    a += kRows * a_row;
    c += kRows * c_row;
    rows -= kRows;
  };
  if constexpr (kLanes == 16) {
    if (columns <= 2 * kLanes) {
      while (rows >= 12) take.template operator()<12, 2>();
      if (rows >= 8) take.template operator()<8, 2>();
    }
  }
  while (rows >= 6) take.template operator()<6, kTileVectors>();
  if (rows >= 4) take.template operator()<4, kTileVectors>();
  if (rows >= 2) take.template operator()<2, kTileVectors>();
  if (rows >= 1) take.template operator()<1, kTileVectors>();
}

// A matrix in fp32, where it is or copied.
struct Rows {
  const float* data;
  std::int64_t row;
};

template <class T>
inline Rows widened(const T* x, std::int64_t x_row, std::int64_t rows, std::int64_t columns, float* to,
                    std::int64_t to_row) {
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; j += kLanes) store(to + i * to_row + j, load(x + i * x_row + j));
  }
  return {to, to_row};
}

// A few consecutive columns, of many rows.
inline Rows few_columns(const float* x, std::int64_t x_row, std::int64_t rows, std::int64_t columns,
                        float* to) {
  if (x_row <= kShortRow) return {x, x_row};
  return widened(x, x_row, rows, columns, to, kPanel);
}
inline Rows few_columns(const BF16* x, std::int64_t x_row, std::int64_t rows, std::int64_t columns,
                        float* to) {
  return widened(x, x_row, rows, columns, to, kPanel);
}

inline Rows few_rows(const float* x, std::int64_t x_row, std::int64_t, std::int64_t, float*) {
  return {x, x_row};
}
inline Rows few_rows(const BF16* x, std::int64_t x_row, std::int64_t rows, std::int64_t columns, float* to) {
  return widened(x, x_row, rows, columns, to, columns);
}

// x (columns, depth) as (depth, kPanel).
template <class T>
inline void transposed(const T* x, std::int64_t x_row, std::int64_t columns, std::int64_t depth, float* to) {
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    for (std::int64_t p = 0; p < depth; p += kLanes) {
      F32 block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(x + (j + i) * x_row + p);
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(to + (p + i) * kPanel + j, block[i]);
    }
  }
}

template <class T>
inline void grouped_product(const GroupedPanel& at, Rows b, float* scratch) {
  const T* a = static_cast<const T*>(at.a);
  T* c = static_cast<T*>(at.c);
  float init[kPanel];
  if (at.bias != nullptr) widened(static_cast<const T*>(at.bias), 0, 1, at.columns, init, 0);
  for (std::int64_t i = 0; i < at.rows; i += kStrip) {
    const std::int64_t rows = at.rows - i < kStrip ? at.rows - i : kStrip;
    const Rows strip = few_rows(a + i * at.a_row, at.a_row, rows, at.depth, scratch);
    grouped_columns(rows, strip.data, strip.row, 1, b.data, b.row, at.bias == nullptr ? nullptr : init,
                    c + i * at.c_row, at.c_row, at.columns, at.depth);
  }
}

// C = bias + A B^T, for B as (columns, depth).
template <class T>
void grouped_linear_panel(const GroupedPanel& at, float* scratch) {
  transposed(static_cast<const T*>(at.b), at.b_row, at.columns, at.depth, scratch);
  grouped_product<T>(at, {scratch, kPanel}, scratch + kPanel * at.depth);
}

// C = A B.
template <class T>
void grouped_grad_input_panel(const GroupedPanel& at, float* scratch) {
  const Rows b = few_columns(static_cast<const T*>(at.b), at.b_row, at.depth, at.columns, scratch);
  grouped_product<T>(at, b, scratch + kPanel * at.depth);
}

// C = A^T B for A as (depth, rows); rows is a multiple of 16.
template <class T>
void grouped_grad_weight_panel(const GroupedPanel& at, float* scratch) {
  const T* a = static_cast<const T*>(at.a);
  T* c = static_cast<T*>(at.c);
  T* sums = static_cast<T*>(at.column_sums);
  const Rows b = few_columns(static_cast<const T*>(at.b), at.b_row, at.depth, at.columns, scratch);
  for (std::int64_t first = 0; first < at.rows; first += kPanel) {
    const std::int64_t width = at.rows - first < kPanel ? at.rows - first : kPanel;
    const Rows block = few_columns(a + first, at.a_row, at.depth, width, scratch + kPanel * at.depth);
    grouped_columns(width, block.data, 1, block.row, b.data, b.row, nullptr, c + first * at.c_row, at.c_row,
                    at.columns, at.depth);
    if (sums == nullptr) continue;
    for (std::int64_t i = 0; i < width; i += kLanes) {
      F32 sum = set(0.0f);
      for (std::int64_t p = 0; p < at.depth; ++p) sum = sum + load(block.data + p * block.row + i);
      store(sums + first + i, sum);
    }
  }
}
