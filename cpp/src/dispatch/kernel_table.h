// One table of function pointers per CPU target. Everything a target offers goes through its table, which is
// the only symbol with external linkage of the target's translation unit.
#pragma once

#include <cstdint>

#include "ds/activation.h"
#include "ds/dtype.h"

namespace ds {

struct ActivationGrads;
struct AdagradScalars;
struct AdamScalars;
struct BlockAttention;
struct BlockAttentionRow;
struct BlockAttentionRowGrads;
struct GroupedPanel;
struct LambNorms;
struct LambScalars;
struct LionScalars;
struct Rounding;
struct RoundingKeys;
struct RowSumGrads;
struct RowSums;
struct SgdScalars;

// A state tensor is fp32, bf16 or (SGD without momentum) absent; an output copy is absent or one of the three
// dtypes.
inline constexpr int kNumStateKinds = 2;
inline constexpr int kNumOutKinds = 1 + kNumDTypes;
constexpr int state_kind(DType dtype) { return static_cast<int>(dtype); }
constexpr int grad_kind(DType dtype) { return static_cast<int>(dtype); }
constexpr int out_kind(const void* out, DType dtype) {
  return out == nullptr ? 0 : 1 + static_cast<int>(dtype);
}

using AdamFn = void (*)(const AdamScalars&, float* param, void* exp_avg, void* exp_avg_sq, const void* grad,
                        void* out, std::int64_t numel);
// Parameters and states in the formats of ds/formats.h that Adam has kernels of its own for. States that are
// rounded are bf16, [Note: stochastic rounding].
enum class AdamFormat { kSplit, kSplitRounded, kNarrow, kNarrowRounded };  // narrow: bf16 without master bits
inline constexpr int kNumAdamFormats = 4;
using AdamFormattedFn = void (*)(const AdamScalars&, void* param, std::int16_t* low, void* exp_avg,
                                 void* exp_avg_sq, const void* grad, void* out, const RoundingKeys& keys,
                                 std::int64_t numel);
using Adam8Fn = void (*)(const AdamScalars&, float* param, std::uint8_t* exp_avg, std::uint8_t* exp_avg_sq,
                         const void* grad, void* out, std::uint32_t key, std::int64_t numel);
template <class Scalars>
using OneStateFn = void (*)(const Scalars&, float* param, void* state, const void* grad, void* out,
                            std::int64_t numel);
using LambMomentsFn = void (*)(const LambScalars&, const float* param, void* exp_avg, void* exp_avg_sq,
                               const void* grad, LambNorms* norms, std::int64_t numel);
using LambApplyFn = void (*)(const LambScalars&, float minus_step, float* param, const void* exp_avg,
                             const void* exp_avg_sq, void* out, std::int64_t numel);
using SumFn = double (*)(const void* data, std::int64_t numel);
using CastFn = void (*)(const void* src, void* dst, std::int64_t numel);
using PackSignsFn = double (*)(const void* x, std::uint8_t* bits, std::int64_t numel);
using ChecksumFn = std::uint64_t (*)(const void* data, std::int64_t first_word, std::int64_t bytes);
using UnpackSignsFn = void (*)(const std::uint8_t* bits, float scale, void* out, std::int64_t numel);

// Each encodes or decodes one block; the encoders return its scale.
using SignEncodeFn = float (*)(const void* x, void* residual, std::uint8_t* bits, std::int64_t numel);
using SignDecodeFn = void (*)(const std::uint8_t* bits, float scale, bool add, void* out, std::int64_t numel);
using IntEncodeFn = float (*)(const void* x, void* residual, std::uint8_t* codes, std::int64_t numel,
                              std::int64_t begin, const Rounding& rounding);
using IntDecodeFn = void (*)(const std::uint8_t* codes, float scale, float weight, bool add, void* out,
                             std::int64_t numel);

using GroupedPanelFn = void (*)(const GroupedPanel&, float* scratch);

struct KernelTable {
  AdamFn adam[kNumStateKinds][kNumDTypes][kNumOutKinds];        // [state][grad][out], as the others
  AdamFormattedFn adam_formatted[kNumAdamFormats][kNumDTypes];  // [AdamFormat][grad]
  AdamFormattedFn adam_rounded[kNumDTypes][kNumOutKinds];       // fp32 parameters, [grad][out]
  Adam8Fn adam8[kNumDTypes][kNumOutKinds];                      // [grad][out]
  OneStateFn<AdagradScalars> adagrad[kNumStateKinds][kNumDTypes][kNumOutKinds];
  OneStateFn<LionScalars> lion[kNumStateKinds][kNumDTypes][kNumOutKinds];
  OneStateFn<SgdScalars> sgd[kNumStateKinds + 1][kNumDTypes][kNumOutKinds];  // last: no momentum
  LambMomentsFn lamb_moments[kNumStateKinds][kNumDTypes];                    // [state][grad]
  LambApplyFn lamb_apply[kNumStateKinds][kNumOutKinds];                      // [state][out]
  SumFn sum_squares[kNumDTypes];
  CastFn cast[kNumDTypes][kNumDTypes];  // [src][dst]
  PackSignsFn pack_signs[kNumDTypes];
  UnpackSignsFn unpack_signs[kNumDTypes];
  ChecksumFn checksum;
  void (*block_attention)(const BlockAttention&, const BlockAttentionRow&, float* out, float* lse,
                          float* scratch);
  void (*block_attention_backward)(const BlockAttention&, const BlockAttentionRow&,
                                   const BlockAttentionRowGrads&, float* scratch);
  // [function][dtype]; elements begin to end - 1
  void (*activation[kNumActivations][kNumStateKinds])(const void* x, const void* factor, void* out,
                                                      std::int64_t begin, std::int64_t end);
  void (*activation_grad[kNumActivations][kNumStateKinds])(const ActivationGrads&, std::int64_t begin,
                                                           std::int64_t end);
  GroupedPanelFn grouped_linear[kNumStateKinds];  // [dtype], as the four that follow
  GroupedPanelFn grouped_grad_input[kNumStateKinds];
  GroupedPanelFn grouped_grad_weight[kNumStateKinds];
  void (*row_sum[kNumStateKinds])(const RowSums&, const void* rows, const void* weights, std::int64_t sum,
                                  void* out);
  void (*row_sum_grad[kNumStateKinds])(const RowSums&, const RowSumGrads&, std::int64_t sum);
  SignEncodeFn sign_encode[kNumDTypes][1 + kNumStateKinds];  // [x][residual: absent, fp32, bf16]
  SignDecodeFn sign_decode[kNumDTypes];
  IntEncodeFn int_encode[2][kNumDTypes][1 + kNumStateKinds];  // [4 or 8 bits][x][residual]
  IntDecodeFn int_decode[2][kNumDTypes];
  // ds/formats.h
  void (*join_master)(const BF16* high, const std::int16_t* low, float* out, std::int64_t numel);
  void (*split_master)(const float* x, BF16* high, std::int16_t* low, std::int64_t numel);
  void (*round_away)(const float* x, BF16* out, std::int64_t numel);
  void (*round_stochastically)(const float* x, BF16* out, std::uint32_t key, std::int64_t numel);
};

namespace baseline {
extern const KernelTable kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kKernels;
}
namespace avx512 {
extern const KernelTable kKernels;
}
#endif

// The table of cpu_target().
const KernelTable& kernels();

}  // namespace ds
