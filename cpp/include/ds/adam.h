// Adam (Kingma and Ba 2015, algorithm 1) and AdamW (Loshchilov and Hutter 2019, algorithm 2) over lists of
// tensors.
//
// Per element, every operation rounded to fp32 once, in this order:
//   g = float(grad) * grad_scale
//   decoupled:                      p = p * (1 - lr * weight_decay)
//   else, if weight_decay != 0:     g = g + weight_decay * p
//   m = m * beta1 + (1 - beta1) * g
//   v = v * beta2 + ((1 - beta2) * g) * g
//   p = p + (-lr / (1 - beta1^step) * m) / (sqrt(v) * (1 / sqrt(1 - beta2^step)) + eps)
//   out = round to nearest even (p)
// m and v may be stored in bf16: the update then uses the values before rounding.
#pragma once

#include <cstdint>
#include <span>

#include "ds/checksum.h"
#include "ds/formats.h"
#include "ds/update.h"

namespace ds {

struct AdamOptions {
  std::int64_t step = 1;  // of this update, counted from 1
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.0;
  bool decoupled = true;
  double grad_scale = 1.0;
};

// What the kernels read: each computed in fp64, rounded to fp32 once.
struct AdamScalars {
  explicit AdamScalars(const AdamOptions& options);
  float grad_scale;
  float l2;     // weight decay added to the gradient
  float decay;  // factor on the parameter
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float inv_bias2_sqrt;
  float eps;
  float minus_step_size;
};

// States: exp_avg, exp_avg_sq.
void adam_step(const AdamOptions& options, std::span<const UpdateTensor> tensors, int num_threads,
               std::span<const UpdateSums> sums = {}, std::span<const TensorFormat> formats = {},
               const RoundingKeys& keys = {});

}  // namespace ds
