// Feed-forward blocks of many experts, down(f(up(x))) or, with a gate, down(f(gate(x)) up(x)): grouped linear
// layers (ds/grouped.h) and an activation (ds/activation.h) in one call.
#pragma once

#include <cstdint>

#include "ds/activation.h"
#include "ds/dtype.h"

namespace ds {

struct GroupedFeedForward {
  const std::int64_t* sizes;  // (groups): rows of each expert
  std::int64_t groups;
  std::int64_t rows;    // the sum of sizes
  std::int64_t hidden;  // a multiple of 16
  std::int64_t inner;   // a multiple of 16
  DType dtype;
  Activation function;
};

// Weights (groups, out, in) and biases (groups, out) of the three layers, or their gradients. Biases may be
// null; the gate's are null without a gate.
struct FeedForwardTensors {
  void* up;
  void* up_bias;
  void* gate;
  void* gate_bias;
  void* down;
  void* down_bias;
};

// Of size (rows, inner): the argument of the activation; up(x) where that is not the argument, which is null
// without a gate; the input of the down layer.
struct FeedForwardInner {
  void* argument;
  void* factor;
  void* active;
};

// Writes all of `inner`, and out (rows, hidden).
void grouped_feed_forward(const GroupedFeedForward& job, const void* x, const FeedForwardTensors& weights,
                          const FeedForwardInner& inner, void* out, int num_threads);

// From grad, the gradient of out, and the argument and factor that forward wrote: dx (rows, hidden) by the up
// layer, dx_gate (rows, hidden) by the gate, null without one, and the gradients of weights. Writes
// inner.active again, and the gradients of argument and factor to `inner_grads`, whose `active` is not used.
void grouped_feed_forward_grad(const GroupedFeedForward& job, const void* grad, const void* x,
                               const FeedForwardTensors& weights, const FeedForwardInner& inner,
                               const FeedForwardInner& inner_grads, void* dx, void* dx_gate,
                               const FeedForwardTensors& weight_grads, int num_threads);

}  // namespace ds
