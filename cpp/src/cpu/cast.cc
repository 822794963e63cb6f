#include "ds/cast.h"

#include "cpu/elementwise.h"
#include "dispatch/kernel_table.h"

namespace ds {

void cast(std::span<const CastTensor> tensors, int num_threads) {
  const KernelTable& table = kernels();
  for_each_piece(tensors, num_threads, [&](const CastTensor& t, std::int64_t begin, std::int64_t numel) {
    const CastFn fn = table.cast[static_cast<int>(t.src_dtype)][static_cast<int>(t.dst_dtype)];
    fn(at(t.src, t.src_dtype, begin), at(t.dst, t.dst_dtype, begin), numel);
  });
}

}  // namespace ds
