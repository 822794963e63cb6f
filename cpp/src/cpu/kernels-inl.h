// Everything that a CPU target offers: included once per target, inside its region and its anonymous
// namespace, after its simd_*.h. Formulas first, then the loops over them. (Comments between groups keep
// clang-format from sorting across.)
#include "formulas/adagrad-inl.h"
#include "formulas/adam-inl.h"
#include "formulas/codes-inl.h"
#include "formulas/lamb-inl.h"
#include "formulas/lion-inl.h"
#include "formulas/sgd-inl.h"
// Walking memory.
#include "cpu/sweep-inl.h"
// Sums, which LAMB uses.
#include "cpu/norm-inl.h"
// Attention, whose exponential function activations use.
#include "cpu/block_attention-inl.h"
// The rest.
#include "cpu/activation-inl.h"
#include "cpu/adam8-inl.h"
#include "cpu/cast-inl.h"
#include "cpu/checksum-inl.h"
#include "cpu/codes-inl.h"
#include "cpu/formats-inl.h"
#include "cpu/grouped-inl.h"
#include "cpu/row_sums-inl.h"
#include "cpu/signs-inl.h"
#include "cpu/update-inl.h"

// clang-format off
#define DS_OUTS(fn, ...) {fn<__VA_ARGS__, Absent>, fn<__VA_ARGS__, float>, fn<__VA_ARGS__, BF16>, fn<__VA_ARGS__, F16>}
#define DS_GRADS(fn, ...) {DS_OUTS(fn, __VA_ARGS__, float), DS_OUTS(fn, __VA_ARGS__, BF16), DS_OUTS(fn, __VA_ARGS__, F16)}
#define DS_ADAM(State) {DS_OUTS(adam_range, State, float), DS_OUTS(adam_range, State, BF16), DS_OUTS(adam_range, State, F16)}
#define DS_ADAM_FORMATTED(...) {adam_formatted_range<__VA_ARGS__, float, Absent>, adam_formatted_range<__VA_ARGS__, BF16, Absent>, adam_formatted_range<__VA_ARGS__, F16, Absent>}
#define DS_LAMB_GRADS(State) {lamb_moments_range<State, float>, lamb_moments_range<State, BF16>, lamb_moments_range<State, F16>}
#define DS_ADAM8(Grad) {adam8_range<Grad, Absent>, adam8_range<Grad, float>, adam8_range<Grad, BF16>, adam8_range<Grad, F16>}
#define DS_ACTIVATION(fn, Function) {fn<Function, float>, fn<Function, BF16>}
#define DS_DTYPES(fn) {fn<float>, fn<BF16>, fn<F16>}
#define DS_RESIDUALS(fn, ...) {fn<__VA_ARGS__, Absent>, fn<__VA_ARGS__, float>, fn<__VA_ARGS__, BF16>}
#define DS_INT_ENCODE(bits) {DS_RESIDUALS(int_encode_block, bits, float), DS_RESIDUALS(int_encode_block, bits, BF16), DS_RESIDUALS(int_encode_block, bits, F16)}
#define DS_INT_DECODE(bits) {int_decode_block<bits, float>, int_decode_block<bits, BF16>, int_decode_block<bits, F16>}
#define DS_CASTS(Src) {cast_range<Src, float>, cast_range<Src, BF16>, cast_range<Src, F16>}

constexpr KernelTable kTable = {
    .adam = {DS_ADAM(float), DS_ADAM(BF16)},
    .adam_formatted = {DS_ADAM_FORMATTED(BF16, std::int16_t, float), DS_ADAM_FORMATTED(BF16, std::int16_t, BF16),
                       DS_ADAM_FORMATTED(BF16, Absent, float), DS_ADAM_FORMATTED(BF16, Absent, BF16)},
    .adam_rounded = DS_GRADS(adam_formatted_range, float, Absent, BF16),
    .adam8 = {DS_ADAM8(float), DS_ADAM8(BF16), DS_ADAM8(F16)},
    .adagrad = {DS_GRADS(one_state_range, AdagradScalars, float), DS_GRADS(one_state_range, AdagradScalars, BF16)},
    .lion = {DS_GRADS(one_state_range, LionScalars, float), DS_GRADS(one_state_range, LionScalars, BF16)},
    .sgd = {DS_GRADS(one_state_range, SgdScalars, float), DS_GRADS(one_state_range, SgdScalars, BF16),
            DS_GRADS(one_state_range, SgdScalars, Absent)},
    .lamb_moments = {DS_LAMB_GRADS(float), DS_LAMB_GRADS(BF16)},
    .lamb_apply = {DS_OUTS(lamb_apply_range, float), DS_OUTS(lamb_apply_range, BF16)},
    .sum_squares = DS_DTYPES(sum_squares),
    .cast = {DS_CASTS(float), DS_CASTS(BF16), DS_CASTS(F16)},
    .pack_signs = DS_DTYPES(pack_signs_range),
    .unpack_signs = DS_DTYPES(unpack_signs_range),
    .checksum = checksum,
    .block_attention = block_attention_row,
    .block_attention_backward = block_attention_row_backward,
    .activation = {DS_ACTIVATION(activation_range, Gelu), DS_ACTIVATION(activation_range, Relu), DS_ACTIVATION(activation_range, Silu)},
    .activation_grad = {DS_ACTIVATION(activation_grad_range, Gelu), DS_ACTIVATION(activation_grad_range, Relu), DS_ACTIVATION(activation_grad_range, Silu)},
    .grouped_linear = {grouped_linear_panel<float>, grouped_linear_panel<BF16>},
    .grouped_grad_input = {grouped_grad_input_panel<float>, grouped_grad_input_panel<BF16>},
    .grouped_grad_weight = {grouped_grad_weight_panel<float>, grouped_grad_weight_panel<BF16>},
    .row_sum = {row_sum<float>, row_sum<BF16>},
    .row_sum_grad = {row_sum_grad<float>, row_sum_grad<BF16>},
    .sign_encode = {DS_RESIDUALS(sign_encode_block, float), DS_RESIDUALS(sign_encode_block, BF16), DS_RESIDUALS(sign_encode_block, F16)},
    .sign_decode = DS_DTYPES(sign_decode_block),
    .int_encode = {DS_INT_ENCODE(4), DS_INT_ENCODE(8)},
    .int_decode = {DS_INT_DECODE(4), DS_INT_DECODE(8)},
    .join_master = join_master,
    .split_master = split_master,
    .round_away = round_away,
    .round_stochastically = round_stochastically,
};
// clang-format on
