// Adagrad (Duchi, Hazan and Singer 2011) over lists of tensors, as torch.optim.Adagrad defines it.
//
// Per element, every operation rounded to fp32 once:
//   g = float(grad) * grad_scale;   if weight_decay != 0:  g = g + weight_decay * p
//   sum = sum + g * g
//   p = p + (-lr / (1 + (step - 1) * lr_decay) * g) / (sqrt(sum) + eps)
//   out = round to nearest even (p)
#pragma once

#include <cstdint>
#include <span>

#include "ds/checksum.h"
#include "ds/formats.h"
#include "ds/update.h"

namespace ds {

struct AdagradOptions {
  std::int64_t step = 1;  // of this update, counted from 1
  double lr = 1e-2;
  double lr_decay = 0.0;
  double eps = 1e-10;
  double weight_decay = 0.0;
  double grad_scale = 1.0;
};

// What the kernels read: each computed in fp64, rounded to fp32 once.
struct AdagradScalars {
  explicit AdagradScalars(const AdagradOptions& options);
  float grad_scale;
  float l2;
  float eps;
  float minus_lr;
};

// States: sum.
void adagrad_step(const AdagradOptions& options, std::span<const UpdateTensor> tensors, int num_threads,
                  std::span<const UpdateSums> sums = {}, std::span<const TensorFormat> formats = {},
                  const RoundingKeys& keys = {});

}  // namespace ds
