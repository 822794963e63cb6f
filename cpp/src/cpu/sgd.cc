#include "ds/sgd.h"

#include "cpu/tiles.h"

namespace ds {

SgdScalars::SgdScalars(const SgdOptions& o)
    : grad_scale(static_cast<float>(o.grad_scale)),
      l2(static_cast<float>(o.weight_decay)),
      momentum(static_cast<float>(o.momentum)),
      one_minus_dampening(static_cast<float>(1.0 - o.dampening)),
      minus_lr(static_cast<float>(-o.lr)),
      has_momentum(o.momentum != 0.0),
      first(o.first),
      nesterov(o.nesterov) {}

void sgd_step(const SgdOptions& options, std::span<const UpdateTensor> tensors, int num_threads,
              std::span<const UpdateSums> sums, std::span<const TensorFormat> formats,
              const RoundingKeys& keys) {
  one_state_step(SgdScalars(options), kernels().sgd, tensors, num_threads, sums, formats, keys);
}

}  // namespace ds
