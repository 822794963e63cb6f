// What the kernels of the CPU targets get for gradients of sums of rows.
#pragma once

namespace ds {

struct RowSumGrads {
  const void* grad;
  const void* rows;
  const void* weights;
  void* drows;
  void* dweights;
};

}  // namespace ds
