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

namespace {

// Of a bf16 parameter.
AdamFormat adam_format(const TensorFormat& format) {
  if (format.low != nullptr) return format.stochastic ? AdamFormat::kSplitRounded : AdamFormat::kSplit;
  return format.stochastic ? AdamFormat::kNarrowRounded : AdamFormat::kNarrow;
}

}  // namespace

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
    const bool wide = format.param_dtype == DType::kF32;
    // The others are 16-bit parameters with 8-bit states or states rounded to nearest, fp16 parameters, and
    // copies that round ties away.
    if (format.away || format.param_dtype == DType::kF16) return false;
    if (!format.stochastic && (wide || t.state_dtype != DType::kF32)) return false;
    const AdamFormattedFn fn =
        wide ? table.adam_rounded[grad_kind(t.grad_dtype)][out_kind(t.out, t.out_dtype)]
             : table.adam_formatted[static_cast<int>(adam_format(format))][grad_kind(t.grad_dtype)];
    const auto run = [&](std::int64_t from, std::int64_t n) {
      void* param = at(t.param, format.param_dtype, from);
      void* out = at(t.out, t.out_dtype, from);
      fn(scalars, param, format.low == nullptr ? nullptr : format.low + from,
         at(t.states[0], t.state_dtype, from), at(t.states[1], t.state_dtype, from),
         at(t.grad, t.grad_dtype, from), out, keys, n);
      if (!wide && out != nullptr) {
        table.cast[static_cast<int>(format.param_dtype)][static_cast<int>(t.out_dtype)](param, out, n);
      }
    };
    // A copy is made of what is in the cache.
    const std::int64_t each = wide || t.out == nullptr ? numel : Tile::kNumel;
    for (const std::int64_t end = begin + numel; begin < end; begin += each) {
      run(begin, std::min(each, end - begin));
    }
    return true;
  };
  for_each_formatted_update(tensors, num_threads, sums, formats, keys, update, direct);
}

}  // namespace ds
