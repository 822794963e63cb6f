// One lane of the formulas on a GPU thread: the names of cpu/simd_baseline.h, each one IEEE operation that
// the compiler may not fuse. Included inside an anonymous namespace.

#include "formulas/half-inl.h"

struct F32 {
  float raw;
};

DS_INLINE F32 set(float x) { return {x}; }
DS_INLINE F32 operator+(F32 a, F32 b) { return {__fadd_rn(a.raw, b.raw)}; }
DS_INLINE F32 operator-(F32 a, F32 b) { return {__fsub_rn(a.raw, b.raw)}; }
DS_INLINE F32 operator*(F32 a, F32 b) { return {__fmul_rn(a.raw, b.raw)}; }
DS_INLINE F32 operator/(F32 a, F32 b) { return {__fdiv_rn(a.raw, b.raw)}; }
DS_INLINE F32 sqrt(F32 a) { return {__fsqrt_rn(a.raw)}; }
DS_INLINE F32 sign(F32 a) { return {static_cast<float>((a.raw > 0.0f) - (a.raw < 0.0f))}; }

// The dtype is known at run time only: all threads of a block take the same branch, so that one kernel serves
// every combination of dtypes, and one launch a list of mixed ones.
DS_INLINE F32 load(const void* base, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::kBF16:
      return {widen(static_cast<const BF16*>(base)[i])};
    case DType::kF16:
      return {widen(static_cast<const F16*>(base)[i])};
    default:
      return {static_cast<const float*>(base)[i]};
  }
}

DS_INLINE void store(void* base, DType dtype, std::int64_t i, F32 a) {
  switch (dtype) {
    case DType::kBF16:
      return narrow(static_cast<BF16*>(base) + i, a.raw);
    case DType::kF16:
      return narrow(static_cast<F16*>(base) + i, a.raw);
    default:
      static_cast<float*>(base)[i] = a.raw;
  }
}
