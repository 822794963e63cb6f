// Activation functions between two linear layers, with an optional gate, and their gradients.
#pragma once

#include <cstdint>

#include "ds/dtype.h"

namespace ds {

enum class Activation : std::uint8_t { kGelu = 0, kRelu = 1, kSilu = 2 };
inline constexpr int kNumActivations = 3;

// Arrays of one dtype, fp32 or bf16, with `numel` elements, a multiple of 16; arithmetic is in fp32, rounded
// once.
struct ActivationJob {
  Activation function;
  DType dtype;
  std::int64_t numel;
};

// out = f(x) factor, or f(x) if factor is null. gelu(x) = x Phi(x), with the error function and not its
// approximation by tanh; silu(x) = x / (1 + exp(-x)). The error of f is at most 2^-20 max(1, |x|) (tested).
void activation(const ActivationJob& job, const void* x, const void* factor, void* out, int num_threads);

// From grad, the gradient of out: dx = grad factor f'(x), which may be written over grad, and, unless factor
// is null, dfactor = grad f(x). Writes out, too.
void activation_grad(const ActivationJob& job, const void* grad, const void* x, const void* factor, void* dx,
                     void* dfactor, void* out, int num_threads);

}  // namespace ds
