#include "ds/grouped_feed_forward.h"

#include "ds/grouped.h"

namespace ds {
namespace {

struct Layers {
  explicit Layers(const GroupedFeedForward& job)
      : widening{job.sizes, job.groups, job.hidden, job.inner, job.dtype},
        narrowing{job.sizes, job.groups, job.inner, job.hidden, job.dtype},
        activation{job.function, job.dtype, job.rows * job.inner} {}
  GroupedLinear widening;   // up and gate
  GroupedLinear narrowing;  // down
  ActivationJob activation;
};

}  // namespace

void grouped_feed_forward(const GroupedFeedForward& job, const void* x, const FeedForwardTensors& weights,
                          const FeedForwardInner& inner, void* out, int num_threads) {
  const Layers layers(job);
  if (weights.gate != nullptr) {
    grouped_linear(layers.widening, x, weights.gate, weights.gate_bias, inner.argument, num_threads);
    grouped_linear(layers.widening, x, weights.up, weights.up_bias, inner.factor, num_threads);
  } else {
    grouped_linear(layers.widening, x, weights.up, weights.up_bias, inner.argument, num_threads);
  }
  activation(layers.activation, inner.argument, inner.factor, inner.active, num_threads);
  grouped_linear(layers.narrowing, inner.active, weights.down, weights.down_bias, out, num_threads);
}

void grouped_feed_forward_grad(const GroupedFeedForward& job, const void* grad, const void* x,
                               const FeedForwardTensors& weights, const FeedForwardInner& inner,
                               const FeedForwardInner& inner_grads, void* dx, void* dx_gate,
                               const FeedForwardTensors& weight_grads, int num_threads) {
  const Layers layers(job);
  // The gradient of the active values first, over which that of the argument is written.
  grouped_linear_grad_input(layers.narrowing, grad, weights.down, inner_grads.argument, num_threads);
  activation_grad(layers.activation, inner_grads.argument, inner.argument, inner.factor, inner_grads.argument,
                  inner_grads.factor, inner.active, num_threads);
  grouped_linear_grad_weight(layers.narrowing, grad, inner.active, weight_grads.down, weight_grads.down_bias,
                             num_threads);
  const void* of_up = inner_grads.argument;
  if (weights.gate != nullptr) {
    of_up = inner_grads.factor;
    grouped_linear_grad_weight(layers.widening, inner_grads.argument, x, weight_grads.gate,
                               weight_grads.gate_bias, num_threads);
    grouped_linear_grad_input(layers.widening, inner_grads.argument, weights.gate, dx_gate, num_threads);
  }
  grouped_linear_grad_weight(layers.widening, of_up, x, weight_grads.up, weight_grads.up_bias, num_threads);
  grouped_linear_grad_input(layers.widening, of_up, weights.up, dx, num_threads);
}

}  // namespace ds
