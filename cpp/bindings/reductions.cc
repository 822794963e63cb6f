#include "ds/cast.h"
#include "ds/checksum.h"
#include "ds/crc32c.h"
#include "ds/norm.h"
#include "gpu.h"
#include "tensor.h"

namespace ds::bindings {
namespace {

NormTensor norm_tensor(const View& view) { return {view.data, view.numel, view.dtype}; }

py::tuple squared_norm_of(py::handle list, int threads) {
  TensorReader reader("squared_norm");
  const Items items(list, "squared_norm", "tensors");
  std::vector<NormTensor> tensors;
  tensors.reserve(items.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    tensors.push_back(norm_tensor(reader.floats(items[i], "tensors", kFloats, static_cast<std::int64_t>(i))));
  }
  if (reader.on_gpu()) {
    throw py::value_error(
        "squared_norm: on a GPU, add up squared_norm_blocks");  // the caller's mistake, not a user's
  }
  SquaredNorm norm;
  {
    py::gil_scoped_release unlocked;
    norm = squared_norm(tensors, threads);
  }
  return py::make_tuple(norm.sum, norm.finite);
}

void squared_norm_blocks_of(py::handle tensor, std::int64_t block_numel, py::handle out, int threads) {
  TensorReader reader("squared_norm_blocks");
  const View view = reader.floats(tensor, "tensor", kFloats);
  const View sums = reader.typed(out, "out", dlpack::kFloat, 64, "float64");
  if (block_numel < 1) throw py::value_error("squared_norm_blocks: block_numel must be positive");
  const std::int64_t blocks = (view.numel + block_numel - 1) / block_numel;
  reader.require_numel(sums, blocks, "out", -1, "the list of blocks");
  if (reader.on_gpu()) {
    const NormTensor on_device = norm_tensor(view);
    gpu_check("squared_norm_blocks",
              gpu()->squared_norm_blocks(reader.device_index(), &on_device, 1, block_numel,
                                         static_cast<double*>(sums.data), reader.stream()));
    return;
  }
  py::gil_scoped_release unlocked;
  squared_norm_blocks(norm_tensor(view), block_numel, static_cast<double*>(sums.data), threads);
}

void cast_all(py::handle sources, py::handle destinations, int threads) {
  TensorReader reader("cast");
  const Items src(sources, "cast", "src"), dst(destinations, "cast", "dst");
  reader.require_count(dst.size(), src.size(), "dst", "src");
  std::vector<CastTensor> tensors;
  tensors.reserve(src.size());
  for (std::size_t i = 0; i < src.size(); ++i) {
    const auto index = static_cast<std::int64_t>(i);
    const View from = reader.floats(src[i], "src", kFloats, index);
    const View to = reader.floats(dst[i], "dst", kFloats, index);
    reader.require_numel(to, from.numel, "dst", index, "src");
    tensors.push_back({from.data, to.data, from.numel, from.dtype, to.dtype});
  }
  if (reader.on_gpu()) {
    gpu_check("cast", gpu()->cast(reader.device_index(), tensors.data(),
                                  static_cast<std::int64_t>(tensors.size()), reader.stream()));
    return;
  }
  py::gil_scoped_release unlocked;
  cast(tensors, threads);
}

std::uint32_t crc32c_of(const py::buffer& buffer, std::uint32_t crc, int threads) {
  const py::buffer_info info = buffer.request();
  const auto size = static_cast<std::size_t>(info.size * info.itemsize);
  if (PyBuffer_IsContiguous(info.view(), 'C') == 0)
    throw py::value_error("crc32c: the buffer must be contiguous");
  py::gil_scoped_release unlocked;
  return crc32c(crc, info.ptr, size, threads);
}

void checksums_of(py::handle list, py::handle out, int threads) {
  TensorReader reader("checksums");
  const Items items(list, "checksums", "tensors"), outs(out, "checksums", "out");
  reader.require_count(outs.size(), items.size(), "out", "tensors");
  std::vector<ChecksumTensor> tensors;
  tensors.reserve(items.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    const auto index = static_cast<std::int64_t>(i);
    bool packed = false;  // 8-bit states
    const View view = reader.states(items[i], "tensors", kFloats, index, &packed);
    const View sums = reader.typed(outs[i], "out", dlpack::kInt, 64, "int64", index);
    reader.require_numel(sums, num_checksums(view.numel), "out", index, "the list of blocks");
    tensors.push_back(
        {view.data, view.numel, packed ? DType::kU8 : view.dtype, static_cast<std::uint64_t*>(sums.data)});
  }
  if (reader.on_gpu()) throw py::value_error("checksums: tensors must be on the CPU");
  py::gil_scoped_release unlocked;
  checksums(tensors, threads);
}

}  // namespace

void bind_reductions(py::module_& m) {
  m.def("squared_norm", &squared_norm_of);
  m.def("squared_norm_blocks", &squared_norm_blocks_of);
  m.def("cast", &cast_all);
  m.def("checksums", &checksums_of);
  m.def("crc32c", &crc32c_of);
}

}  // namespace ds::bindings
