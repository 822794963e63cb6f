#include "ds/block_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/block_attention.h"
#include "dispatch/kernel_table.h"
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

BlockAttentionRow row_at(const BlockAttention& job, const Place& at, const float* kt, float* inverse_sums) {
  const std::int64_t begin = job.offsets[at.offset];
  return {.q = job.q + at.queries * job.dim,
          .kt = kt + at.kv,
          .v = job.v + at.kv,
          .bias = job.bias == nullptr ? nullptr : job.bias + at.sample * job.rows * job.block,
          .columns = job.columns + begin,
          .num_columns = job.offsets[at.offset + 1] - begin,
          .row = at.row,
          .inverse_sums = inverse_sums};
}

}  // namespace

void block_attention_forward(const BlockAttention& job, float* out, float* lse, int num_threads) {
  const std::vector<float> kt = transposed_blocks(job, job.k, num_threads);
  const KernelTable& table = kernels();
  parallel_for(job.batch * job.heads * job.rows, num_threads, [&](std::int64_t task) {
    const Place at(job, task / job.rows, task % job.rows);
    std::vector<float> scratch(static_cast<std::size_t>(job.block * (job.block + 3)));
    float* inverse = scratch.data() + job.block * (job.block + 2);
    float* own = lse + at.queries;
    table.block_attention(job, row_at(job, at, kt.data(), inverse), out + at.queries * job.dim, own,
                          scratch.data());
    for (std::int64_t i = 0; i < job.block; ++i) own[i] -= std::log(inverse[i]);
  });
}

void block_attention_backward(const BlockAttention& job, const BlockAttentionGrads& grads, int num_threads) {
  const std::vector<float> kt = transposed_blocks(job, job.k, num_threads);
  const std::vector<float> vt = transposed_blocks(job, job.v, num_threads);
  const KernelTable& table = kernels();
  const std::int64_t sharing = job.heads / job.kv_heads;
  parallel_for(job.batch * job.kv_heads, num_threads, [&](std::int64_t task) {
    std::vector<float> scratch(static_cast<std::size_t>(job.block * (2 * job.block + 1)));
    for (std::int64_t shared = 0; shared < sharing; ++shared) {
      for (std::int64_t row = 0; row < job.rows; ++row) {
        const Place at(job, task * sharing + shared, row);
        const std::int64_t queries = at.queries * job.dim;
        const BlockAttentionRowGrads g = {.out = grads.out + queries,
                                          .grad = grads.grad + queries,
                                          .lse = grads.lse + at.queries,
                                          .k = job.k + at.kv,
                                          .vt = vt.data() + at.kv,
                                          .dq = grads.dq + queries,
                                          .dk = grads.dk + at.kv,
                                          .dv = grads.dv + at.kv};
        table.block_attention_backward(job, row_at(job, at, kt.data(), nullptr), g, scratch.data());
      }
    }
  });
}

}  // namespace ds
