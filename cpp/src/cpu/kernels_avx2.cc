// The kernels for CPUs with AVX2, FMA and F16C.
// Headers come before the region: an inline function compiled inside it could replace the portable copy.
#include <cstdint>

#include "cpu/activation.h"
#include "cpu/block_attention.h"
#include "cpu/grouped.h"
#include "cpu/row_sums.h"
#include "dispatch/kernel_table.h"
#include "ds/adagrad.h"
#include "ds/adam.h"
#include "ds/block_attention.h"
#include "ds/checksum.h"
#include "ds/codes.h"
#include "ds/formats.h"
#include "ds/lamb.h"
#include "ds/lion.h"
#include "ds/row_sums.h"
#include "ds/sgd.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace ds::avx2 {
namespace {
#define DS_INLINE inline __attribute__((always_inline))
#include "cpu/simd_avx2.h"
// (first the vectors, then what is written in them)
#include "cpu/kernels-inl.h"
}  // namespace

extern const KernelTable kKernels = kTable;

}  // namespace ds::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // defined(__x86_64__)
