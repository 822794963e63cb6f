#include "ds/lamb.h"

#include <cmath>

#include "cpu/blocks.h"
#include "cpu/elementwise.h"

namespace ds {

LambScalars::LambScalars(const LambOptions& o)
    : grad_scale(static_cast<float>(o.grad_scale)),
      beta1(static_cast<float>(o.beta1)),
      one_minus_beta1(static_cast<float>(1.0 - o.beta1)),
      beta2(static_cast<float>(o.beta2)),
      one_minus_beta2(static_cast<float>(1.0 - o.beta2)),
      inv_bias1(static_cast<float>(1.0 / (1.0 - std::pow(o.beta1, static_cast<double>(o.step))))),
      inv_bias2_sqrt(
          static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(o.beta2, static_cast<double>(o.step))))),
      eps(static_cast<float>(o.eps)),
      weight_decay(static_cast<float>(o.weight_decay)) {}

void lamb_moments(const LambOptions& options, std::span<const UpdateTensor> tensors, LambNorms* norms,
                  int num_threads) {
  const LambScalars scalars(options);
  const KernelTable& table = kernels();
  const std::vector<Block> blocks = norm_blocks(tensors);
  std::vector<LambNorms> sums(blocks.size());
  parallel_for(static_cast<std::int64_t>(blocks.size()), num_threads, [&](std::int64_t i) {
    const Block& block = blocks[static_cast<std::size_t>(i)];
    const UpdateTensor& t = tensors[block.tensor];
    const LambMomentsFn fn = table.lamb_moments[state_kind(t.state_dtype)][grad_kind(t.grad_dtype)];
    fn(scalars, t.param + block.begin, at(t.states[0], t.state_dtype, block.begin),
       at(t.states[1], t.state_dtype, block.begin), at(t.grad, t.grad_dtype, block.begin),
       &sums[static_cast<std::size_t>(i)], block.numel);
  });
  std::fill_n(norms, tensors.size(), LambNorms{});
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    norms[blocks[i].tensor].param_squared += sums[i].param_squared;
    norms[blocks[i].tensor].direction_squared += sums[i].direction_squared;
  }
}

void lamb_apply(const LambOptions& options, std::span<const UpdateTensor> tensors, const float* minus_steps,
                int num_threads) {
  const LambScalars scalars(options);
  const KernelTable& table = kernels();
  for_each_piece(tensors, num_threads, [&](const UpdateTensor& t, std::int64_t begin, std::int64_t numel) {
    const LambApplyFn fn = table.lamb_apply[state_kind(t.state_dtype)][out_kind(t.out, t.out_dtype)];
    fn(scalars, minus_steps[&t - tensors.data()], t.param + begin, at(t.states[0], t.state_dtype, begin),
       at(t.states[1], t.state_dtype, begin), at(t.out, t.out_dtype, begin), numel);
  });
}

}  // namespace ds
