// CRC-32C (Castagnoli, polynomial 0x1EDC6F41 reflected), as iSCSI, ext4 and RocksDB use it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ds {

// The checksum of `size` bytes that follow bytes whose checksum is `crc` (0 at the start). "123456789" gives
// 0xE3069283. Hardware instructions where the CPU has SSE4.2, several threads for large buffers.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t size, int num_threads = 1);

// The checksum of A followed by B from those of A and of B, and the size of B in bytes.
std::uint32_t crc32c_combine(std::uint32_t crc_a, std::uint32_t crc_b, std::uint64_t size_b);

}  // namespace ds
