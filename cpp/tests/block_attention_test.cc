#include "ds/block_attention.h"

#include <cmath>

#include "check.h"

using namespace ds;
using namespace ds::check;

namespace {

constexpr std::int64_t kBatch = 2, kHeads = 2, kRows = 3, kBlock = 16, kDim = 32, kTokens = kRows * kBlock;

// Rows 0 to 2 of both heads; each has the block on the diagonal.
const std::vector<std::int64_t> kOffsets = {0, 1, 3, 5, 6, 8, 11};
const std::vector<std::int64_t> kColumns = {0, 0, 1, 0, 2, 0, 0, 1, 0, 1, 2};

struct Data {
  std::vector<float> q = random_floats(kBatch * kHeads * kTokens * kDim, 1, 1.0f);
  std::vector<float> k = random_floats(kBatch * kTokens * kDim, 2, 1.0f);
  std::vector<float> v = random_floats(kBatch * kTokens * kDim, 3, 1.0f);
  std::vector<float> bias = random_floats(kBatch * kTokens, 4, 1.0f);
  std::vector<float> grad = random_floats(kBatch * kHeads * kTokens * kDim, 5, 1.0f);

  BlockAttention job(bool causal) const {
    return {.q = q.data(),
            .k = k.data(),
            .v = v.data(),
            .bias = bias.data(),
            .batch = kBatch,
            .heads = kHeads,
            .kv_heads = 1,
            .rows = kRows,
            .block = kBlock,
            .dim = kDim,
            .scale = 0.2f,
            .causal = causal,
            .offsets = kOffsets.data(),
            .columns = kColumns.data()};
  }
};

bool counts(const BlockAttention& job, std::int64_t head, std::int64_t query, std::int64_t key) {
  if (job.causal && key > query && key / kBlock == query / kBlock) return false;
  const std::int64_t row = head * kRows + query / kBlock;
  for (std::int64_t i = kOffsets[row]; i < kOffsets[row + 1]; ++i) {
    if (kColumns[i] == key / kBlock) return true;
  }
  return false;
}

// Everything in fp64, one query at a time.
void oracle(const Data& data, const BlockAttention& job, std::vector<double>& out, std::vector<double>& dq,
            std::vector<double>& dk, std::vector<double>& dv) {
  for (std::int64_t n = 0; n < kBatch * kHeads * kTokens; ++n) {
    const std::int64_t sample = n / (kHeads * kTokens), head = n / kTokens % kHeads, query = n % kTokens;
    std::vector<double> p(kTokens, 0.0);
    double sum = 0.0, delta = 0.0;
    for (std::int64_t t = 0; t < kTokens; ++t) {
      if (!counts(job, head, query, t)) continue;
      double s = 0.0;
      for (std::int64_t d = 0; d < kDim; ++d) {
        s += static_cast<double>(data.q[n * kDim + d]) *
             static_cast<double>(data.k[(sample * kTokens + t) * kDim + d]);
      }
      p[t] = std::exp(s * 0.2f + data.bias[sample * kTokens + t]);
      sum += p[t];
    }
    std::vector<double> dp(kTokens, 0.0);
    for (std::int64_t t = 0; t < kTokens; ++t) {
      p[t] /= sum;
      for (std::int64_t d = 0; d < kDim; ++d) {
        const std::int64_t at = (sample * kTokens + t) * kDim + d;
        out[n * kDim + d] += p[t] * data.v[at];
        dv[at] += p[t] * data.grad[n * kDim + d];
        dp[t] += static_cast<double>(data.grad[n * kDim + d]) * static_cast<double>(data.v[at]);
      }
      delta += p[t] * dp[t];
    }
    for (std::int64_t t = 0; t < kTokens; ++t) {
      const double ds = p[t] * (dp[t] - delta) * 0.2f;
      for (std::int64_t d = 0; d < kDim; ++d) {
        const std::int64_t at = (sample * kTokens + t) * kDim + d;
        dq[n * kDim + d] += ds * data.k[at];
        dk[at] += ds * data.q[n * kDim + d];
      }
    }
  }
}

void check_near(const std::vector<float>& actual, const std::vector<double>& expected) {
  for (std::size_t i = 0; i < actual.size(); ++i) {
    CHECK(std::abs(static_cast<double>(actual[i]) - expected[i]) <= 2e-5 * (1.0 + std::abs(expected[i])));
  }
}

}  // namespace

TEST(attends_to_the_blocks_and_returns_their_gradients) {
  const Data data;
  for (const bool causal : {false, true}) {
    const BlockAttention job = data.job(causal);
    std::vector<double> out(data.q.size()), dq(data.q.size()), dk(data.k.size()), dv(data.v.size());
    oracle(data, job, out, dq, dk, dv);
    for_each_target([&] {
      for (const int threads : {1, 3}) {
        std::vector<float> values(data.q.size()), lse(kBatch * kHeads * kTokens);
        block_attention_forward(job, values.data(), lse.data(), threads);
        check_near(values, out);
        std::vector<float> own_dq(dq.size()), own_dk(dk.size()), own_dv(dv.size());
        block_attention_backward(job,
                                 {.out = values.data(),
                                  .lse = lse.data(),
                                  .grad = data.grad.data(),
                                  .dq = own_dq.data(),
                                  .dk = own_dk.data(),
                                  .dv = own_dv.data()},
                                 threads);
        check_near(own_dq, dq);
        check_near(own_dk, dk);
        check_near(own_dv, dv);
      }
    });
  }
}
