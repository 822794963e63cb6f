// LAMB (You et al. 2020, algorithm 2) over lists of tensors, each one a segment with its own trust ratio.
//
// Two passes, so that a caller whose segments continue on other ranks can add up the norms between them.
// Per element, every operation rounded to fp32 once:
//   g = float(grad) * grad_scale
//   m = m * beta1 + (1 - beta1) * g                    rounded to the states' dtype, as v
//   v = v * beta2 + ((1 - beta2) * g) * g
//   u = (m * (1 / (1 - beta1^step))) / (sqrt(v) * (1 / sqrt(1 - beta2^step)) + eps) + weight_decay * p
// then, per segment, with norms in fp64 over fixed blocks (ds/norm.h):
//   ratio = min(max(|p| / |u|, min_ratio), max_ratio);  1 where |p| or |u| is 0
//   p = p + (-lr * ratio) * u
//   out = round to nearest even (p)
#pragma once

#include <cstdint>
#include <span>

#include "ds/update.h"

namespace ds {

struct LambOptions {
  std::int64_t step = 1;  // of this update, counted from 1
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-6;
  double weight_decay = 0.0;
  double grad_scale = 1.0;
};

// What the kernels read: each computed in fp64, rounded to fp32 once.
struct LambScalars {
  explicit LambScalars(const LambOptions& options);
  float grad_scale;
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float inv_bias1;
  float inv_bias2_sqrt;
  float eps;
  float weight_decay;
};

struct LambNorms {
  double param_squared;
  double direction_squared;
};

// First pass: m and v are updated, norms[i] gets the sums of squares of tensors[i]'s p and u.
void lamb_moments(const LambOptions& options, std::span<const UpdateTensor> tensors, LambNorms* norms,
                  int num_threads);

// Second pass: p = p + minus_steps[i] * u, and out. Reads no gradient.
void lamb_apply(const LambOptions& options, std::span<const UpdateTensor> tensors, const float* minus_steps,
                int num_threads);

}  // namespace ds
