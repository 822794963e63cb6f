#include "ds/crc32c.h"

#include "check.h"

using namespace ds;

namespace {

std::uint32_t bit_by_bit(const std::vector<unsigned char>& data) {
  std::uint32_t crc = ~0u;
  for (const unsigned char byte : data) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1u) != 0 ? 0x82f63b78u : 0u);
  }
  return ~crc;
}

std::vector<unsigned char> bytes(std::size_t n) {
  std::vector<unsigned char> data(n);
  std::uint32_t state = 12345;
  for (unsigned char& byte : data)
    byte = static_cast<unsigned char>((state = state * 1664525u + 1013904223u) >> 24);
  return data;
}

}  // namespace

TEST(known_answers) {
  CHECK_EQ(crc32c(0, "123456789", 9), 0xe3069283u);
  CHECK_EQ(crc32c(0, "", 0), 0u);
  const std::vector<unsigned char> zeros(32, 0);  // RFC 3720, B.4
  CHECK_EQ(crc32c(0, zeros.data(), 32), 0x8a9136aau);
}

TEST(every_path_agrees) {
  for (const std::size_t n :
       {1u, 7u, 8u, 100u, 3u * 8192u - 1u, 3u * 8192u, 3u * 8192u + 5u, 3u * (1u << 20) + 77u}) {
    const std::vector<unsigned char> data = bytes(n);
    const std::uint32_t expected = bit_by_bit(data);
    CHECK_EQ(crc32c(0, data.data(), n), expected);
    CHECK_EQ(crc32c(0, data.data(), n, 3), expected);
    const std::size_t half = n / 2;
    const std::uint32_t first = crc32c(0, data.data(), half);
    CHECK_EQ(crc32c(first, data.data() + half, n - half), expected);
    CHECK_EQ(crc32c_combine(first, crc32c(0, data.data() + half, n - half), n - half), expected);
  }
}
