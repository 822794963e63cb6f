// The C ABI of libds_core_cuda.so (and of a HIP build of the same sources). The core opens that library at
// run time and links nothing of it, so ds_core works without a GPU, and a wheel depends on no CUDA version.
//
// All functions launch on `stream` and return at once: 0, or a status that ds_gpu_message explains. Arrays of
// structs and scalars are read before the return; the tensors inside are device memory of `device`. Same
// formulas and, with IEEE rounding, the same bits as on the CPU.
#pragma once

#include <cstdint>

#include "ds/adagrad.h"
#include "ds/adam.h"
#include "ds/cast.h"
#include "ds/codes.h"
#include "ds/lamb.h"
#include "ds/lion.h"
#include "ds/norm.h"
#include "ds/row_sums.h"
#include "ds/sgd.h"

// Raised with every change of a signature or of a struct that crosses it.
#define DS_GPU_ABI 3

// name, parameters between "int device" and "void* stream"
#define DS_GPU_FUNCTIONS(X)                                                                                  \
  X(adam, const ds::AdamScalars*, const ds::UpdateTensor*, std::int64_t)                                     \
  X(adagrad, const ds::AdagradScalars*, const ds::UpdateTensor*, std::int64_t)                               \
  X(lion, const ds::LionScalars*, const ds::UpdateTensor*, std::int64_t)                                     \
  X(sgd, const ds::SgdScalars*, const ds::UpdateTensor*, std::int64_t)                                       \
  /* block_sums: device, LambNorms of each block of kNormBlock elements of each tensor, in order */          \
  X(lamb_moments, const ds::LambScalars*, const ds::UpdateTensor*, std::int64_t, ds::LambNorms* block_sums)  \
  /* minus_steps: host, one per tensor */                                                                    \
  X(lamb_apply, const ds::LambScalars*, const ds::UpdateTensor*, std::int64_t, const float* minus_steps)     \
  /* block_sums: device, one per block of block_numel elements of each tensor, in order */                   \
  X(squared_norm_blocks, const ds::NormTensor*, std::int64_t, std::int64_t block_numel, double* block_sums)  \
  X(cast, const ds::CastTensor*, std::int64_t)                                                               \
  /* block_sums: device, sums of magnitudes per block of kNormBlock elements */                              \
  X(pack_signs, const ds::NormTensor*, std::uint8_t* bits, double* block_sums)                               \
  X(unpack_signs, const std::uint8_t* bits, float scale, const ds::CastTensor* dst)                          \
  /* blocks: device; the caller answers for them */                                                          \
  X(sign_encode, const ds::CodeBlock* blocks, std::int64_t, const ds::CodeSource*, float* scales,            \
    std::uint8_t* codes)                                                                                     \
  X(sign_decode, const ds::CodeBlock* blocks, std::int64_t, const float* scales, const std::uint8_t* codes,  \
    const ds::CodeTarget*)                                                                                   \
  X(int_encode, const ds::CodeBlock* blocks, std::int64_t, const ds::CodeSource*, int bits,                  \
    const ds::Rounding*, float* scales, std::uint8_t* codes)                                                 \
  X(int_decode, const ds::CodeBlock* blocks, std::int64_t, const float* scales, const std::uint8_t* codes,   \
    int bits, const ds::CodeTarget*)                                                                         \
  /* the index of a job: device; the caller answers for it */                                                \
  X(row_sums, const ds::RowSums*, const void* rows, const void* weights, void* out)                          \
  X(row_sums_grad, const ds::RowSums*, const void* grad, const void* rows, const void* weights, void* drows, \
    void* dweights)

#define DS_GPU_API __attribute__((visibility("default")))

extern "C" {
DS_GPU_API int ds_gpu_abi();
DS_GPU_API const char* ds_gpu_message(int status);
DS_GPU_API int ds_gpu_num_devices();
// Page-locks whole pages of host memory for copies by every device, and ends that. Both synchronize.
DS_GPU_API int ds_gpu_host_register(void* pages, std::uint64_t size);
DS_GPU_API int ds_gpu_host_unregister(void* pages);
#define DS_DECLARE(name, ...) DS_GPU_API int ds_gpu_##name(int device, __VA_ARGS__, void* stream);
DS_GPU_FUNCTIONS(DS_DECLARE)
#undef DS_DECLARE
}
