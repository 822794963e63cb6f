// Linear layers of many experts in one call: the rows of expert g are multiplied by its own matrix. Forward
// and backward, in fp32 and bf16, with sums in fp32.
//
// [Note: order of sums of grouped products] Each element is one chain of multiply-adds in fp32, rounded once
// to the dtype of its tensor at the end:
//   out[m, o]   starts from the bias, or 0, and adds x[m, i] w[o, i] in the order of i
//   dx[m, i]    starts from 0 and adds grad[m, o] w[o, i] in the order of o
//   dw[o, i]    starts from 0 and adds grad[m, o] x[m, i] in the order of rows m
//   dbias[o]    starts from 0 and adds grad[m, o] in the order of rows m
// So the bits of a row do not depend on the other rows, on how rows are distributed over experts, or on the
// number of threads. With n terms and the unit roundoff u = 2^-24, the error is at most n u / (1 - n u) times
// the sum of the magnitudes of the terms (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
// section 3.1), and in bf16 one rounding of 2^-8 of the result more. The baseline target rounds products and
// sums apart (n + 1 for n above).
#pragma once

#include <cstdint>

#include "ds/dtype.h"

namespace ds {

// Tensors are contiguous, all of one dtype, fp32 or bf16: rows of experts follow each other in the order of
// experts.
struct GroupedLinear {
  const std::int64_t* sizes;  // (groups): rows of each expert
  std::int64_t groups;
  std::int64_t inputs;   // a multiple of 16
  std::int64_t outputs;  // a multiple of 16
  DType dtype;
};

// out (rows, outputs) from x (rows, inputs), weight (groups, outputs, inputs) and bias (groups, outputs) or
// null.
void grouped_linear(const GroupedLinear& job, const void* x, const void* weight, const void* bias, void* out,
                    int num_threads);

// dx (rows, inputs) from grad (rows, outputs), the gradient of out.
void grouped_linear_grad_input(const GroupedLinear& job, const void* grad, const void* weight, void* dx,
                               int num_threads);

// dw (groups, outputs, inputs), and dbias (groups, outputs) unless it is null. Experts without rows get
// zeros.
void grouped_linear_grad_weight(const GroupedLinear& job, const void* grad, const void* x, void* dw,
                                void* dbias, int num_threads);

}  // namespace ds
