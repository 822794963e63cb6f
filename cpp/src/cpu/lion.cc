#include "ds/lion.h"

#include "cpu/tiles.h"

namespace ds {

LionScalars::LionScalars(const LionOptions& o)
    : grad_scale(static_cast<float>(o.grad_scale)),
      decay(static_cast<float>(1.0 - o.lr * o.weight_decay)),
      beta1(static_cast<float>(o.beta1)),
      one_minus_beta1(static_cast<float>(1.0 - o.beta1)),
      beta2(static_cast<float>(o.beta2)),
      one_minus_beta2(static_cast<float>(1.0 - o.beta2)),
      minus_lr(static_cast<float>(-o.lr)) {}

void lion_step(const LionOptions& options, std::span<const UpdateTensor> tensors, int num_threads,
               std::span<const UpdateSums> sums, std::span<const TensorFormat> formats,
               const RoundingKeys& keys) {
  one_state_step(LionScalars(options), kernels().lion, tensors, num_threads, sums, formats, keys);
}

}  // namespace ds
