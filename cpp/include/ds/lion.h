// Lion (Chen et al. 2023, algorithm 2) over lists of tensors.
//
// Per element, every operation rounded to fp32 once:
//   g = float(grad) * grad_scale
//   d = sign(m * beta1 + (1 - beta1) * g)          sign(0) = sign(NaN) = 0, as torch.sign
//   m = m * beta2 + (1 - beta2) * g
//   p = p * (1 - lr * weight_decay) + (-lr) * d
//   out = round to nearest even (p)
#pragma once

#include <span>

#include "ds/checksum.h"
#include "ds/formats.h"
#include "ds/update.h"

namespace ds {

struct LionOptions {
  double lr = 1e-4;
  double beta1 = 0.9;
  double beta2 = 0.99;
  double weight_decay = 0.0;
  double grad_scale = 1.0;
};

// What the kernels read: each computed in fp64, rounded to fp32 once.
struct LionScalars {
  explicit LionScalars(const LionOptions& options);
  float grad_scale;
  float decay;
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float minus_lr;
};

// States: exp_avg.
void lion_step(const LionOptions& options, std::span<const UpdateTensor> tensors, int num_threads,
               std::span<const UpdateSums> sums = {}, std::span<const TensorFormat> formats = {},
               const RoundingKeys& keys = {});

}  // namespace ds
