// SGD with momentum over lists of tensors, as torch.optim.SGD defines it.
//
// Per element, every operation rounded to fp32 once:
//   g = float(grad) * grad_scale;   if weight_decay != 0:  g = g + weight_decay * p
//   momentum != 0:  b = g on the first step, else b * momentum + (1 - dampening) * g
//                   g = g + momentum * b with nesterov, else b
//   p = p + (-lr) * g
//   out = round to nearest even (p)
#pragma once

#include <span>

#include "ds/checksum.h"
#include "ds/formats.h"
#include "ds/update.h"

namespace ds {

struct SgdOptions {
  bool first = true;  // the momentum buffers hold nothing yet
  double lr = 1e-3;
  double momentum = 0.0;
  double dampening = 0.0;
  double weight_decay = 0.0;
  bool nesterov = false;
  double grad_scale = 1.0;
};

// What the kernels read: each computed in fp64, rounded to fp32 once.
struct SgdScalars {
  explicit SgdScalars(const SgdOptions& options);
  float grad_scale;
  float l2;
  float momentum;
  float one_minus_dampening;
  float minus_lr;
  bool has_momentum;
  bool first;
  bool nesterov;
};

// States: momentum_buffer where momentum != 0, else none.
void sgd_step(const SgdOptions& options, std::span<const UpdateTensor> tensors, int num_threads,
              std::span<const UpdateSums> sums = {}, std::span<const TensorFormat> formats = {},
              const RoundingKeys& keys = {});

}  // namespace ds
