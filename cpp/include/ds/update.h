// What one optimizer step reads and writes for one tensor.
#pragma once

#include <cstdint>

#include "ds/dtype.h"

namespace ds {

struct UpdateTensor {
  float* param;
  void* states[2];   // state_dtype; null where the optimizer has fewer
  const void* grad;  // grad_dtype
  void* out;         // out_dtype: a copy of the new parameter; or null
  std::int64_t numel;
  DType state_dtype;  // kF32 or kBF16
  DType grad_dtype;
  DType out_dtype;
};

}  // namespace ds
