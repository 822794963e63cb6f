#include "ds/adagrad.h"

#include "cpu/tiles.h"

namespace ds {

AdagradScalars::AdagradScalars(const AdagradOptions& o)
    : grad_scale(static_cast<float>(o.grad_scale)),
      l2(static_cast<float>(o.weight_decay)),
      eps(static_cast<float>(o.eps)),
      minus_lr(static_cast<float>(-o.lr / (1.0 + static_cast<double>(o.step - 1) * o.lr_decay))) {}

void adagrad_step(const AdagradOptions& options, std::span<const UpdateTensor> tensors, int num_threads,
                  std::span<const UpdateSums> sums, std::span<const TensorFormat> formats,
                  const RoundingKeys& keys) {
  one_state_step(AdagradScalars(options), kernels().adagrad, tensors, num_threads, sums, formats, keys);
}

}  // namespace ds
