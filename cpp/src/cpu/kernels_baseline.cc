// The kernels for any CPU.
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

namespace ds::baseline {
namespace {
#define DS_INLINE inline __attribute__((always_inline))
#include "cpu/simd_baseline.h"
// (first the vectors, then what is written in them)
#include "cpu/kernels-inl.h"
}  // namespace

extern const KernelTable kKernels = kTable;

}  // namespace ds::baseline
