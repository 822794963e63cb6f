// One launch for many tensors. The table of tensors travels in the kernel's parameters: no allocation, no
// copy, no synchronisation, so a launch can be captured into a graph. Included inside an anonymous namespace.

// 32 tensors of 56 bytes stay below the 4 KiB that every device takes as parameters.
constexpr int kTableSize = 32;
constexpr int kThreads = 256;

template <class Tensor>
struct Table {
  Tensor tensors[kTableSize];
  std::int64_t first[kTableSize + 1];  // of each tensor, the number of its first unit of work
  int count;
  std::int64_t base;  // units in the launches before this one

  // The tensor that owns a unit.
  DS_INLINE int owner(std::int64_t unit) const {
    int low = 0;
    for (int high = count; high - low > 1;) {
      const int middle = (low + high) / 2;
      (first[middle] <= unit ? low : high) = middle;
    }
    return low;
  }
};

// Cuts each tensor into units of unit_numel elements and calls launch(table, units) for tables of up to
// kTableSize tensors. Returns the first status that is not 0.
template <class Tensor, class Launch>
int for_each_table(const Tensor* tensors, std::int64_t count, std::int64_t unit_numel, Launch launch) {
  std::int64_t base = 0;
  for (std::int64_t begin = 0; begin < count;) {
    Table<Tensor> table{};
    table.base = base;
    for (; begin < count && table.count < kTableSize; ++begin) {
      if (tensors[begin].numel == 0) continue;
      table.tensors[table.count] = tensors[begin];
      const std::int64_t units = (tensors[begin].numel + unit_numel - 1) / unit_numel;
      table.first[table.count + 1] = table.first[table.count] + units;
      ++table.count;
    }
    if (table.count == 0) break;
    launch(table, table.first[table.count]);
    if (const auto status = DS_GPU(GetLastError)(); status != 0) return static_cast<int>(status);
    base += table.first[table.count];
  }
  return 0;
}
