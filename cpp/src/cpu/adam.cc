#include "ds/adam.h"

#include <cmath>

#include "cpu/tiles.h"
#include "dispatch/kernel_table.h"

namespace ds {

AdamScalars::AdamScalars(const AdamOptions& o)
    : grad_scale(static_cast<float>(o.grad_scale)),
      l2(o.decoupled ? 0.0f : static_cast<float>(o.weight_decay)),
      decay(o.decoupled ? static_cast<float>(1.0 - o.lr * o.weight_decay) : 1.0f),
      beta1(static_cast<float>(o.beta1)),
      one_minus_beta1(static_cast<float>(1.0 - o.beta1)),
      beta2(static_cast<float>(o.beta2)),
      one_minus_beta2(static_cast<float>(1.0 - o.beta2)),
      inv_bias2_sqrt(
          static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(o.beta2, static_cast<double>(o.step))))),
      eps(static_cast<float>(o.eps)),
      minus_step_size(static_cast<float>(-o.lr / (1.0 - std::pow(o.beta1, static_cast<double>(o.step))))) {}

void adam_step(const AdamOptions& options, std::span<const UpdateTensor> tensors, int num_threads,
               std::span<const UpdateSums> sums, std::span<const TensorFormat> formats,
               const RoundingKeys& keys) {
  const AdamScalars scalars(options);
  const KernelTable& table = kernels();
  auto update = [&](const UpdateTensor& t, std::int64_t begin, std::int64_t numel) {
    const void* grad = at(t.grad, t.grad_dtype, begin);
    void* out = at(t.out, t.out_dtype, begin);
    if (t.state_dtype == DType::kU8) {
      table.adam8[grad_kind(t.grad_dtype)][out_kind(t.out, t.out_dtype)](
          scalars, t.param + begin, static_cast<std::uint8_t*>(t.states[0]) + begin,
          static_cast<std::uint8_t*>(t.states[1]) + begin, grad, out, keys.state[0], numel);
      return;
    }
    const AdamFn fn =
        table.adam[state_kind(t.state_dtype)][grad_kind(t.grad_dtype)][out_kind(t.out, t.out_dtype)];
    fn(scalars, t.param + begin, at(t.states[0], t.state_dtype, begin), at(t.states[1], t.state_dtype, begin),
       grad, out, numel);
  };
  auto direct = [&](const UpdateTensor& t, const TensorFormat& format, std::int64_t begin,
                    std::int64_t numel) {
    if (format.low == nullptr || t.state_dtype != DType::kF32) return false;
    BF16* high = reinterpret_cast<BF16*>(t.param) + begin;
    table.adam_split[grad_kind(t.grad_dtype)](
        scalars, high, format.low + begin, static_cast<float*>(t.states[0]) + begin,
        static_cast<float*>(t.states[1]) + begin, at(t.grad, t.grad_dtype, begin), numel);
    if (t.out != nullptr) {
      table.cast[static_cast<int>(DType::kBF16)][static_cast<int>(t.out_dtype)](
          high, at(t.out, t.out_dtype, begin), numel);
    }
    return true;
  };
  for_each_formatted_update(tensors, num_threads, sums, formats, keys, update, direct);
}

}  // namespace ds
