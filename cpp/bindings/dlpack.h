// The parts of the DLPack 1.x ABI that are read here (https://dmlc.github.io/dlpack). Layouts are fixed by
// that standard; declared by hand so that building needs no torch.
#pragma once

#include <cstdint>

namespace ds::dlpack {

enum DeviceType : std::int32_t {
  kCpu = 1,
  kCuda = 2,
  kCudaHost = 3,
  kRocm = 10,
  kRocmHost = 11,
  kCudaManaged = 13
};
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  std::int32_t type;
  std::int32_t index;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; may be null (compact) before version 1.2
  std::uint64_t byte_offset;
};

struct ManagedTensor {  // in a capsule named "dltensor"
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};

// type(x).__dlpack_c_exchange_api__, a capsule named "dlpack_exchange_api".
struct ExchangeTable {
  ExchangeHeader header;
  void* allocate;
  void* export_managed;
  void* import_managed;
  int (*borrow)(void* object, Tensor* out);  // may be null; 0, or -1 with a Python exception
  int (*current_stream)(DeviceType type, std::int32_t index, void** stream);
};

}  // namespace ds::dlpack
