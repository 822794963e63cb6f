#include "ds/signs.h"

#include "ds/norm.h"
#include "gpu.h"
#include "tensor.h"

namespace ds::bindings {
namespace {

// Returns the sum of magnitudes; on a GPU 0, and `block_sums` (fp64, one per block) is for the caller to add
// in order.
double pack(py::handle x, py::handle bits, py::handle block_sums, int threads) {
  TensorReader reader("pack_signs");
  const View from = reader.floats(x, "x", kFloats);
  const View to = reader.typed(bits, "bits", dlpack::kUInt, 8, "uint8");
  reader.require_numel(to, (from.numel + 7) / 8, "bits", -1, "x's packed form");
  auto* bytes = static_cast<std::uint8_t*>(to.data);
  if (!reader.on_gpu()) {
    py::gil_scoped_release unlocked;
    return pack_signs(from.data, from.dtype, from.numel, bytes, threads);
  }
  const View sums = reader.typed(block_sums, "block_sums", dlpack::kFloat, 64, "float64");
  reader.require_numel(sums, (from.numel + kNormBlock - 1) / kNormBlock, "block_sums", -1,
                       "x's list of blocks");
  const NormTensor tensor{from.data, from.numel, from.dtype};
  gpu_check("pack_signs", gpu()->pack_signs(reader.device_index(), &tensor, bytes,
                                            static_cast<double*>(sums.data), reader.stream()));
  return 0.0;
}

void unpack(py::handle bits, double scale, py::handle out, int threads) {
  TensorReader reader("unpack_signs");
  const View from = reader.typed(bits, "bits", dlpack::kUInt, 8, "uint8");
  const View to = reader.floats(out, "out", kFloats);
  reader.require_numel(from, (to.numel + 7) / 8, "bits", -1, "out's packed form");
  const auto* bytes = static_cast<const std::uint8_t*>(from.data);
  if (!reader.on_gpu()) {
    py::gil_scoped_release unlocked;
    unpack_signs(bytes, static_cast<float>(scale), to.data, to.dtype, to.numel, threads);
    return;
  }
  const CastTensor target{nullptr, to.data, to.numel, to.dtype, to.dtype};
  gpu_check("unpack_signs", gpu()->unpack_signs(reader.device_index(), bytes, static_cast<float>(scale),
                                                &target, reader.stream()));
}

}  // namespace

void bind_signs(py::module_& m) {
  m.def("pack_signs", &pack);
  m.def("unpack_signs", &unpack);
}

}  // namespace ds::bindings
