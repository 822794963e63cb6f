#include "ds/codes.h"

#include <algorithm>

#include "cpu/elementwise.h"

namespace ds {
namespace {

// Calls run(index of a block) for all blocks, about kTaskNumel elements a task.
template <class Run>
void for_each_block(std::span<const CodeBlock> blocks, int num_threads, Run run) {
  constexpr std::int64_t kTaskNumel = 64 * 1024;
  const auto count = static_cast<std::int64_t>(blocks.size());
  if (count == 0) return;
  const std::int64_t extent = blocks.back().begin + blocks.back().numel - blocks.front().begin;
  const std::int64_t tasks = std::clamp<std::int64_t>(extent / kTaskNumel, 1, count);
  parallel_for(tasks, num_threads, [&](std::int64_t task) {
    for (std::int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) {
      run(static_cast<std::size_t>(i));
    }
  });
}

int residual_kind(const CodeSource& source) { return out_kind(source.residual, source.residual_dtype); }

CodeSource source_at(const CodeSource& source, std::int64_t begin) {
  return {at(source.x, source.dtype, begin), source.dtype, at(source.residual, source.residual_dtype, begin),
          source.residual_dtype};
}

}  // namespace

void sign_encode(std::span<const CodeBlock> blocks, const CodeSource& source, float* scales,
                 std::uint8_t* codes, int num_threads) {
  const SignEncodeFn fn = kernels().sign_encode[static_cast<int>(source.dtype)][residual_kind(source)];
  for_each_block(blocks, num_threads, [&](std::size_t i) {
    const CodeBlock& block = blocks[i];
    const CodeSource from = source_at(source, block.begin);
    scales[i] = fn(from.x, from.residual, codes + block.begin / 8, block.numel);
  });
}

void sign_decode(std::span<const CodeBlock> blocks, const float* scales, const std::uint8_t* codes,
                 const CodeTarget& target, int num_threads) {
  const SignDecodeFn fn = kernels().sign_decode[static_cast<int>(target.dtype)];
  for_each_block(blocks, num_threads, [&](std::size_t i) {
    const CodeBlock& block = blocks[i];
    fn(codes + block.begin / 8, scales[i] * target.weight, target.add,
       at(target.out, target.dtype, block.begin), block.numel);
  });
}

void int_encode(std::span<const CodeBlock> blocks, const CodeSource& source, int bits,
                const Rounding& rounding, float* scales, std::uint8_t* codes, int num_threads) {
  const IntEncodeFn fn =
      kernels().int_encode[bits == 8 ? 1 : 0][static_cast<int>(source.dtype)][residual_kind(source)];
  for_each_block(blocks, num_threads, [&](std::size_t i) {
    const CodeBlock& block = blocks[i];
    const CodeSource from = source_at(source, block.begin);
    scales[i] = fn(from.x, from.residual, codes + block.begin * bits / 8, block.numel, block.begin, rounding);
  });
}

void int_decode(std::span<const CodeBlock> blocks, const float* scales, const std::uint8_t* codes, int bits,
                const CodeTarget& target, int num_threads) {
  const IntDecodeFn fn = kernels().int_decode[bits == 8 ? 1 : 0][static_cast<int>(target.dtype)];
  for_each_block(blocks, num_threads, [&](std::size_t i) {
    const CodeBlock& block = blocks[i];
    fn(codes + block.begin * bits / 8, scales[i], target.weight, target.add,
       at(target.out, target.dtype, block.begin), block.numel);
  });
}

}  // namespace ds
