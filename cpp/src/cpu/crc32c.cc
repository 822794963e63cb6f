#include "ds/crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "ds/parallel.h"
#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace ds {
namespace {

// Polynomials over GF(2) modulo the CRC's, bit-reflected: the highest bit is the coefficient of x^0.
constexpr std::uint32_t kPolynomial = 0x82f63b78u;
constexpr std::uint32_t kOne = 0x80000000u;

constexpr std::uint32_t times_x(std::uint32_t a) { return (a >> 1) ^ ((a & 1u) != 0 ? kPolynomial : 0u); }

constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (std::uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = times_x(b);
  }
  return product;
}

// x^(8 * size): what appending `size` zero bytes multiplies a checksum by.
constexpr std::uint32_t zero_bytes(std::uint64_t size) {
  std::uint32_t power = kOne;
  std::uint32_t square = kOne;
  for (int i = 0; i < 8; ++i) square = times_x(square);
  for (; size != 0; size >>= 1) {
    if ((size & 1u) != 0) power = multiply(power, square);
    square = multiply(square, square);
  }
  return power;
}

// The functions below work on the inverted register that the standard's CRC runs on.
using Update = std::uint32_t (*)(std::uint32_t state, const unsigned char* data, std::size_t size);

std::uint32_t update_portable(std::uint32_t state, const unsigned char* data, std::size_t size) {
  static const auto table = [] {  // table[k][b]: byte b followed by k zero bytes
    std::array<std::array<std::uint32_t, 256>, 8> t{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      std::uint32_t value = byte;
      for (std::size_t k = 0; k < 8; ++k) {
        for (int bit = 0; bit < 8; ++bit) value = times_x(value);
        t[k][byte] = value;
      }
    }
    return t;
  }();
  for (; size >= 8; size -= 8, data += 8) {
    std::uint32_t next = 0;
    for (std::size_t i = 0; i < 8; ++i) {
      const std::uint32_t byte = data[i] ^ (i < 4 ? (state >> (8 * i)) & 0xffu : 0u);
      next ^= table[7 - i][byte];
    }
    state = next;
  }
  for (; size != 0; --size, ++data) state = (state >> 8) ^ table[0][(state ^ *data) & 0xffu];
  return state;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2,crc32"))) std::uint32_t update_one_stream(std::uint32_t state,
                                                                        const unsigned char* data,
                                                                        std::size_t size) {
  std::uint64_t wide = state;
  for (; size >= 8; size -= 8, data += 8) {
    std::uint64_t word;
    std::memcpy(&word, data, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  state = static_cast<std::uint32_t>(wide);
  for (; size != 0; --size, ++data) state = _mm_crc32_u8(state, *data);
  return state;
}

// The instruction takes 3 cycles and starts every cycle: three streams side by side, then joined.
__attribute__((target("sse4.2,crc32"))) std::uint32_t update_sse42(std::uint32_t state,
                                                                   const unsigned char* data,
                                                                   std::size_t size) {
  constexpr std::size_t kStream = 8192;
  static const std::uint32_t shift = zero_bytes(kStream);
  for (; size >= 3 * kStream; size -= 3 * kStream, data += 3 * kStream) {
    std::uint64_t a = state, b = 0, c = 0;
    for (std::size_t i = 0; i < kStream; i += 8) {
      std::uint64_t word_a, word_b, word_c;
      std::memcpy(&word_a, data + i, 8);
      std::memcpy(&word_b, data + kStream + i, 8);
      std::memcpy(&word_c, data + 2 * kStream + i, 8);
      a = _mm_crc32_u64(a, word_a);
      b = _mm_crc32_u64(b, word_b);
      c = _mm_crc32_u64(c, word_c);
    }
    const std::uint32_t ab = multiply(static_cast<std::uint32_t>(a), shift) ^ static_cast<std::uint32_t>(b);
    state = multiply(ab, shift) ^ static_cast<std::uint32_t>(c);
  }
  return update_one_stream(state, data, size);
}
#endif

Update choose_update() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return update_sse42;
#endif
  return update_portable;
}

std::uint32_t serial(std::uint32_t crc, const unsigned char* data, std::size_t size) {
  static const Update update = choose_update();
  return ~update(~crc, data, size);
}

}  // namespace

std::uint32_t crc32c_combine(std::uint32_t crc_a, std::uint32_t crc_b, std::uint64_t size_b) {
  return multiply(crc_a, zero_bytes(size_b)) ^ crc_b;
}

std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t size, int num_threads) {
  constexpr std::size_t kChunk = std::size_t{1} << 20;
  const auto* bytes = static_cast<const unsigned char*>(data);
  if (num_threads <= 1 || size < 2 * kChunk) return serial(crc, bytes, size);

  const std::size_t num_chunks = (size + kChunk - 1) / kChunk;
  std::vector<std::uint32_t> partial(num_chunks);
  parallel_for(static_cast<std::int64_t>(num_chunks), num_threads, [&](std::int64_t chunk) {
    const std::size_t begin = static_cast<std::size_t>(chunk) * kChunk;
    partial[static_cast<std::size_t>(chunk)] = serial(0, bytes + begin, std::min(kChunk, size - begin));
  });
  for (std::size_t i = 0; i < num_chunks; ++i) {
    crc = crc32c_combine(crc, partial[i], std::min(kChunk, size - i * kChunk));
  }
  return crc;
}

}  // namespace ds
