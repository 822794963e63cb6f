// The kernels of src/cuda/row_sums-inl.h, emulated, against those of the CPU.
#include "check.h"
#include "ds/row_sums.h"
#include "emulated_gpu.h"

namespace ds {
namespace {
constexpr int kThreads = 256;
#include "cuda/simd_gpu.h"
// The kernels.
#include "cuda/row_sums-inl.h"

using namespace check;

constexpr std::int64_t kSums = 5, kChoices = 3, kRows = 13;
const std::vector<std::int64_t> kIndex = {4, 0, 13, 2, 1, 3, 12, 13, 5, 7, 6, 11, 9, 8, 10};

// Targets without fused multiply-adds round twice.
void check_close(const std::vector<float>& a, const std::vector<float>& b, std::int64_t terms) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    CHECK(std::fabs(a[i] - b[i]) <= static_cast<float>(terms) * 16.0f * 0x1p-24f);
  }
}

TEST(sums_and_gradients) {
  for (const std::int64_t columns : {16, 48, 64, 304}) {
    const auto rows_numel = static_cast<std::size_t>(kRows * columns);
    const auto sums_numel = static_cast<std::size_t>(kSums * columns);
    const auto rows = random_floats(rows_numel, 1), grad = random_floats(sums_numel, 3);
    const auto weights = random_floats(kSums * kChoices, 2, 1.0f);
    const RowSums job = {kIndex.data(), kSums, kChoices, kRows, columns, DType::kF32};
    std::vector<float> out(sums_numel), plain(sums_numel), drows(rows_numel),
        dweights(kSums * kChoices, 7.0f);
    std::vector<float> out2 = out, plain2 = plain, drows2 = drows, dweights2 = dweights;
    row_sums(job, rows.data(), weights.data(), out.data(), 2);
    row_sums(job, rows.data(), nullptr, plain.data(), 2);
    row_sums_grad(job, grad.data(), rows.data(), weights.data(), drows.data(), dweights.data(), 2);
    emulated::launch(kSums, kThreads,
                     [&] { row_sums_kernel(job, rows.data(), weights.data(), out2.data()); });
    emulated::launch(kSums, kThreads, [&] { row_sums_kernel(job, rows.data(), nullptr, plain2.data()); });
    const auto grid = static_cast<unsigned>((kSums * kChoices * kRowLanes + kThreads - 1) / kThreads);
    emulated::launch(grid, kThreads, [&] {
      row_sums_grad_kernel(job, grad.data(), rows.data(), weights.data(), drows2.data(), dweights2.data());
    });
    check_close(out, out2, kChoices);
    CHECK(plain == plain2);
    CHECK(drows == drows2);
    check_close(dweights, dweights2, columns);
    if (cpu_target() != CpuTarget::kBaseline) {
      CHECK(out == out2);
      CHECK(dweights == dweights2);
    }
  }
}

}  // namespace
}  // namespace ds
