#include "ds/block_attention.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "cpu/block_attention.h"
#include "cpu/elementwise.h"
#include "dispatch/kernel_table.h"
#include "ds/cast.h"
#include "ds/parallel.h"

namespace ds {
namespace {

// Transposes each (block, dim) of `heads` key heads to (dim, block).
std::vector<float> transposed_blocks(const BlockAttention& job, const float* x, int num_threads) {
  const std::int64_t numel = job.block * job.dim, count = job.batch * job.kv_heads * job.rows;
  std::vector<float> out(static_cast<std::size_t>(count * numel));
  parallel_for(count, num_threads, [&](std::int64_t i) {
    const float* from = x + i * numel;
    float* to = out.data() + i * numel;
    for (std::int64_t d = 0; d < job.dim; ++d) {
      for (std::int64_t t = 0; t < job.block; ++t) to[d * job.block + t] = from[t * job.dim + d];
    }
  });
  return out;
}

// A tensor in fp32: where it is, or widened.
class InFp32 {
 public:
  InFp32(const void* x, DType dtype, std::int64_t numel, int num_threads) {
    if (dtype == DType::kF32) {
      data_ = static_cast<const float*>(x);
      return;
    }
    copy_.resize(static_cast<std::size_t>(numel));
    const CastTensor one = {x, copy_.data(), numel, dtype, DType::kF32};
    cast(std::span(&one, 1), num_threads);
    data_ = copy_.data();
  }
  const float* data() const { return data_; }

 private:
  std::vector<float> copy_;
  const float* data_ = nullptr;
};

// Some consecutive elements of a tensor, read into `to`; in fp32 they stay where they are.
const float* widened(const KernelTable& table, const void* x, DType dtype, std::int64_t begin,
                     std::int64_t numel, float* to) {
  if (dtype == DType::kF32) return static_cast<const float*>(x) + begin;
  table.cast[static_cast<int>(dtype)][static_cast<int>(DType::kF32)](at(x, dtype, begin), to, numel);
  return to;
}

// Where some elements are computed in fp32: in the tensor itself, or in `own`, which `narrow` then stores.
float* computed(void* x, DType dtype, std::int64_t begin, float* own) {
  return dtype == DType::kF32 ? static_cast<float*>(x) + begin : own;
}

void narrow(const KernelTable& table, const float* own, void* x, DType dtype, std::int64_t begin,
            std::int64_t numel) {
  if (dtype == DType::kF32) return;
  table.cast[static_cast<int>(DType::kF32)][static_cast<int>(dtype)](own, at(x, dtype, begin), numel);
}

// The place of one block row of one head.
struct Place {
  Place(const BlockAttention& job, std::int64_t head_of_batch, std::int64_t block_row)
      : sample(head_of_batch / job.heads), head(head_of_batch % job.heads), row(block_row) {
    const std::int64_t tokens = job.rows * job.block;
    kv = (sample * job.kv_heads + head / (job.heads / job.kv_heads)) * tokens * job.dim;
    queries = head_of_batch * tokens + row * job.block;
    offset = head * job.rows + row;
  }
  std::int64_t sample, head, row;
  std::int64_t kv;       // first element of the key head
  std::int64_t queries;  // first query, over all heads
  std::int64_t offset;   // index into the offsets
};

BlockAttentionRow row_at(const BlockAttention& job, const Place& at, const float* q, const float* kt,
                         const float* v, float* inverse_sums) {
  const std::int64_t begin = job.offsets[at.offset];
  return {.q = q,
          .kt = kt + at.kv,
          .v = v == nullptr ? nullptr : v + at.kv,
          .bias = job.bias == nullptr ? nullptr : job.bias + at.sample * job.rows * job.block,
          .columns = job.columns + begin,
          .num_columns = job.offsets[at.offset + 1] - begin,
          .row = at.row,
          .inverse_sums = inverse_sums};
}

}  // namespace

void block_attention_forward(const BlockAttention& job, void* out, float* lse, int num_threads) {
  const std::int64_t keys = job.batch * job.kv_heads * job.rows * job.block * job.dim;
  const std::vector<float> kt =
      transposed_blocks(job, InFp32(job.k, job.dtype, keys, num_threads).data(), num_threads);
  const InFp32 v(job.v, job.dtype, keys, num_threads);
  const KernelTable& table = kernels();
  const std::int64_t numel = job.block * job.dim, copies = job.dtype == DType::kF32 ? 0 : 2 * numel;
  parallel_for(job.batch * job.heads * job.rows, num_threads, [&](std::int64_t task) {
    const Place at(job, task / job.rows, task % job.rows);
    std::vector<float> scratch(static_cast<std::size_t>(job.block * (job.block + 3) + copies));
    float* inverse = scratch.data() + job.block * (job.block + 2);
    float* of_row = inverse + job.block;
    float* own = lse + at.queries;
    const std::int64_t first = at.queries * job.dim;
    const float* q = widened(table, job.q, job.dtype, first, numel, of_row);
    float* values = computed(out, job.dtype, first, of_row + numel);
    table.block_attention(job, row_at(job, at, q, kt.data(), v.data(), inverse), values, own, scratch.data());
    narrow(table, values, out, job.dtype, first, numel);
    for (std::int64_t i = 0; i < job.block; ++i) own[i] -= std::log(inverse[i]);
  });
}

void block_attention_backward(const BlockAttention& job, const BlockAttentionGrads& grads, int num_threads) {
  const std::int64_t of_head = job.rows * job.block * job.dim, keys = job.batch * job.kv_heads * of_head;
  const InFp32 k(job.k, job.dtype, keys, num_threads);
  const std::vector<float> kt = transposed_blocks(job, k.data(), num_threads);
  const std::vector<float> vt =
      transposed_blocks(job, InFp32(job.v, job.dtype, keys, num_threads).data(), num_threads);
  const KernelTable& table = kernels();
  const std::int64_t sharing = job.heads / job.kv_heads, numel = job.block * job.dim;
  const bool narrows = job.dtype != DType::kF32;
  parallel_for(job.batch * job.kv_heads, num_threads, [&](std::int64_t task) {
    const std::int64_t squares = job.block * (2 * job.block + 1);
    std::vector<float> scratch(static_cast<std::size_t>(squares + (narrows ? 4 * numel : 0)));
    // Sums over the query heads of a key head are rounded once, at the end.
    std::vector<float> sums(static_cast<std::size_t>(narrows ? 2 * of_head : 0));
    float* of_row = scratch.data() + squares;
    float* dk = computed(grads.dk, job.dtype, task * of_head, sums.data());
    float* dv = computed(grads.dv, job.dtype, task * of_head, sums.data() + (narrows ? of_head : 0));
    for (std::int64_t shared = 0; shared < sharing; ++shared) {
      for (std::int64_t row = 0; row < job.rows; ++row) {
        const Place at(job, task * sharing + shared, row);
        const std::int64_t first = at.queries * job.dim;
        const float* q = widened(table, job.q, job.dtype, first, numel, of_row);
        float* dq = computed(grads.dq, job.dtype, first, of_row + 3 * numel);
        const BlockAttentionRowGrads g = {
            .out = widened(table, grads.out, job.dtype, first, numel, of_row + numel),
            .grad = widened(table, grads.grad, job.dtype, first, numel, of_row + 2 * numel),
            .lse = grads.lse + at.queries,
            .k = k.data() + at.kv,
            .vt = vt.data() + at.kv,
            .dq = dq,
            .dk = dk,
            .dv = dv};
        table.block_attention_backward(job, row_at(job, at, q, kt.data(), nullptr, nullptr), g,
                                       scratch.data());
        narrow(table, dq, grads.dq, job.dtype, first, numel);
      }
    }
    narrow(table, dk, grads.dk, job.dtype, task * of_head, of_head);
    narrow(table, dv, grads.dv, job.dtype, task * of_head, of_head);
  });
}

}  // namespace ds
