// The kernels of codes.cu: 32 consecutive threads, a warp, encode or decode one block. A block is read twice
// by the threads that read it first, because its scale must be known before its residual: the second time
// from the caches. Included inside an anonymous namespace, after simd_gpu.h and fixed_sums.h.
#include "formulas/codes-inl.h"

constexpr int kWarp = 32;
static_assert(kWarp == 2 * kSumLanes, "sign_encode_kernel adds two elements for each accumulator");

// Which block this thread works on, and its place among the threads that do.
struct BlockLane {
  std::int64_t block;
  int lane;
};

DS_INLINE BlockLane block_lane() {
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  return {thread / kWarp, static_cast<int>(thread % kWarp)};
}

// Elements of a block, rounded up so that all threads of its warp make the same number of rounds.
DS_INLINE std::int64_t rounds_end(const CodeBlock& block) {
  return (block.numel + kWarp - 1) / kWarp * kWarp;
}

// v = x + residual, and zeros behind the block
DS_INLINE F32 source_value(const CodeSource& source, const CodeBlock& block, std::int64_t i) {
  if (i >= block.numel) return {0.0f};
  const F32 x = load(source.x, source.dtype, block.begin + i);
  return source.residual == nullptr ? x : x + load(source.residual, source.residual_dtype, block.begin + i);
}

DS_INLINE bool is_negative(F32 v) { return (bits_of(v.raw) >> 31) != 0; }

// out = value, or out += value
DS_INLINE void write_value(const CodeTarget& to, std::int64_t i, F32 value) {
  store(to.out, to.dtype, i, to.add ? load(to.out, to.dtype, i) + value : value);
}

__global__ void __launch_bounds__(kThreads)
    sign_encode_kernel(const CodeBlock* blocks, std::int64_t count, const CodeSource source, float* scales,
                       std::uint8_t* codes) {
  const BlockLane at = block_lane();
  if (at.block >= count) return;  // all threads of the warp
  const CodeBlock block = blocks[at.block];
  double sum = 0.0;
#pragma unroll 4
  for (std::int64_t i = at.lane; i < rounds_end(block); i += kWarp) {
    const F32 v = source_value(source, block, i);
    const double magnitude = fabs(static_cast<double>(v.raw));
    // The lower threads have the 16 accumulators: first their own element, then that of the thread 16 above.
    const double above = DS_SHUFFLE_DOWN(magnitude, kSumLanes, kWarp);
    sum = __dadd_rn(__dadd_rn(sum, magnitude), above);
    const unsigned mask = DS_BALLOT(is_negative(v));
    const std::int64_t first = i - at.lane + 8 * at.lane;  // of the elements of this thread's byte
    if (at.lane < kWarp / 8 && first < block.numel) {
      codes[(block.begin + first) / 8] = static_cast<std::uint8_t>(mask >> (8 * at.lane));
    }
  }
  const double mean = __ddiv_rn(tree_sum(sum), static_cast<double>(block.numel));
  const float scale = DS_SHUFFLE(__double2float_rn(mean), 0, kWarp);
  if (at.lane == 0) scales[at.block] = scale;
  if (source.residual == nullptr) return;
#pragma unroll 4
  for (std::int64_t i = at.lane; i < block.numel; i += kWarp) {
    const F32 v = source_value(source, block, i);
    const F32 decoded = {is_negative(v) ? -scale : scale};
    store(source.residual, source.residual_dtype, block.begin + i, v - decoded);
  }
}

__global__ void __launch_bounds__(kThreads)
    sign_decode_kernel(const CodeBlock* blocks, std::int64_t count, const float* scales,
                       const std::uint8_t* codes, const CodeTarget to) {
  const BlockLane at = block_lane();
  if (at.block >= count) return;
  const CodeBlock block = blocks[at.block];
  const F32 plus = F32{scales[at.block]} * set(to.weight);
#pragma unroll 4
  for (std::int64_t i = block.begin + at.lane; i < block.begin + block.numel; i += kWarp) {
    const bool negative = (codes[i / 8] >> (i % 8) & 1) != 0;
    write_value(to, i, {negative ? -plus.raw : plus.raw});
  }
}

// The scale of a block of integers, from the bits of its largest magnitude.
DS_INLINE float int_scale(std::uint32_t largest, std::int32_t levels) {
  constexpr std::uint32_t kInfinity = 0x7F800000u, kSmallestNormal = 0x00800000u;
  if (largest >= kInfinity) return float_of(0x7FC00000u);
  const F32 scale = F32{float_of(largest)} / set(static_cast<float>(levels));
  return bits_of(scale.raw) < kSmallestNormal ? 0.0f : scale.raw;
}

template <int kBits>
__global__ void __launch_bounds__(kThreads)
    int_encode_kernel(const CodeBlock* blocks, std::int64_t count, const CodeSource source,
                      const Rounding rounding, float* scales, std::uint8_t* codes) {
  constexpr std::int32_t kLevels = (1 << (kBits - 1)) - 1;
  const BlockLane at = block_lane();
  if (at.block >= count) return;
  const CodeBlock block = blocks[at.block];
  unsigned largest = 0;  // magnitudes are ordered as their bits are
#pragma unroll 4
  for (std::int64_t i = at.lane; i < block.numel; i += kWarp) {
    largest = max(largest, bits_of(source_value(source, block, i).raw) & 0x7FFFFFFFu);
  }
  for (int half = kWarp / 2; half > 0; half /= 2) {
    largest = max(largest, DS_SHUFFLE_DOWN(largest, half, kWarp));
  }
  largest = DS_SHUFFLE(largest, 0, kWarp);
  const float scale = int_scale(largest, kLevels);
  if (at.lane == 0) scales[at.block] = scale;
  const F32 inverse = set(1.0f) / set(scale);  // used for a scale above 0 only
  const std::uint32_t key = random_key(rounding.seed, block.begin);
  const auto low = static_cast<std::uint32_t>(block.begin);
#pragma unroll 4
  for (std::int64_t i = at.lane; i < rounds_end(block); i += kWarp) {
    const F32 v = source_value(source, block, i);
    std::int32_t code = 0;
    if (scale > 0.0f) {
      F32 scaled = v * inverse;
      if (rounding.stochastic) {
        const float uniform = uniform_of(random_word(low + static_cast<std::uint32_t>(i), key));
        scaled = scaled + (set(uniform) - set(0.5f));
      }
      code = rounded(bits_of((scaled + set(kRound)).raw), kLevels);
    }
    if constexpr (kBits == 8) {
      if (i < block.numel) codes[block.begin + i] = static_cast<std::uint8_t>(code);
    } else {
      const int above = DS_SHUFFLE_DOWN(code, 1, kWarp);  // of the element that shares the byte
      const int high = i + 1 < block.numel ? above + 8 : 0;
      if (i % 2 == 0 && i < block.numel) {
        codes[(block.begin + i) / 2] = static_cast<std::uint8_t>((code + 8) | high << 4);
      }
    }
    if (source.residual != nullptr && i < block.numel) {
      const F32 decoded = set(static_cast<float>(code)) * set(scale);
      store(source.residual, source.residual_dtype, block.begin + i, v - decoded);
    }
  }
}

template <int kBits>
__global__ void __launch_bounds__(kThreads)
    int_decode_kernel(const CodeBlock* blocks, std::int64_t count, const float* scales,
                      const std::uint8_t* codes, const CodeTarget to) {
  const BlockLane at = block_lane();
  if (at.block >= count) return;
  const CodeBlock block = blocks[at.block];
  const F32 scale = {scales[at.block]};
#pragma unroll 4
  for (std::int64_t i = block.begin + at.lane; i < block.begin + block.numel; i += kWarp) {
    int code;
    if constexpr (kBits == 8) {
      code = static_cast<std::int8_t>(codes[i]);
    } else {
      code = static_cast<int>(codes[i / 2] >> (4 * (i % 2)) & 15) - 8;
    }
    write_value(to, i, set(static_cast<float>(code)) * scale * set(to.weight));
  }
}
