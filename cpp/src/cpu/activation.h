// What the kernels of the CPU targets get for gradients of activation functions.
#pragma once

namespace ds {

struct ActivationGrads {
  const void* grad;
  const void* x;
  const void* factor;
  void* dx;
  void* dfactor;
  void* out;
};

}  // namespace ds
