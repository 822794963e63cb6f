// Conversions between fp32, bf16 and fp16: to nearest even, NaN stays NaN.
#pragma once

#include <cstdint>
#include <span>

#include "ds/dtype.h"

namespace ds {

struct CastTensor {
  const void* src;
  void* dst;
  std::int64_t numel;
  DType src_dtype;
  DType dst_dtype;
};

void cast(std::span<const CastTensor> tensors, int num_threads);

}  // namespace ds
