#include "ds/codes.h"

#include "gpu.h"
#include "tensor.h"

namespace ds::bindings {
namespace {

[[noreturn]] void fail(std::string_view function, const std::string& text) {
  throw py::value_error(std::string(function) + ": " + text);
}

// Reads the int64 pairs (first element, number of elements), and checks those on the CPU.
std::span<const CodeBlock> read_blocks(TensorReader& reader, std::string_view function, py::handle blocks,
                                       std::int64_t numel) {
  const View view = reader.typed(blocks, "blocks", dlpack::kInt, 64, "int64");
  if (view.numel % 2 != 0) fail(function, "blocks must have two columns");
  const std::span<const CodeBlock> rows(static_cast<const CodeBlock*>(view.data),
                                        static_cast<std::size_t>(view.numel / 2));
  if (reader.on_gpu()) return rows;
  std::int64_t free = 0;  // first element behind the blocks so far
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto [begin, count] = rows[i];
    if (begin < free || begin % 8 != 0 || count < 1 || count > kMaxCodeBlock || count > numel - begin) {
      fail(function, "blocks[" + std::to_string(i) + "] = (" + std::to_string(begin) + ", " +
                         std::to_string(count) + ") must begin at a multiple of 8 at or behind " +
                         std::to_string(free) + ", have 1 to " + std::to_string(kMaxCodeBlock) +
                         " elements, and end within the tensor's " + std::to_string(numel));
    }
    free = (begin + count + 7) / 8 * 8;
  }
  return rows;
}

std::int64_t count_of(std::span<const CodeBlock> rows) { return static_cast<std::int64_t>(rows.size()); }

struct Codes {
  float* scales;
  std::uint8_t* codes;
};

Codes read_codes(TensorReader& reader, std::string_view function, py::handle scales, py::handle codes,
                 std::size_t count, std::int64_t bytes) {
  const View s = reader.floats(scales, "scales", kFloat32);
  const View c = reader.typed(codes, "codes", dlpack::kUInt, 8, "uint8");
  if (s.numel != static_cast<std::int64_t>(count)) {
    fail(function, "scales has " + std::to_string(s.numel) + " elements, but there are " +
                       std::to_string(count) + " blocks");
  }
  if (c.numel < bytes) {
    fail(function, "codes has " + std::to_string(c.numel) + " bytes, but needs " + std::to_string(bytes));
  }
  return {static_cast<float*>(s.data), static_cast<std::uint8_t*>(c.data)};
}

CodeSource read_source(TensorReader& reader, py::handle x, py::handle residual, std::int64_t& numel) {
  const View from = reader.floats(x, "x", kFloats);
  numel = from.numel;
  CodeSource source{from.data, from.dtype, nullptr, DType::kF32};
  if (!residual.is_none()) {
    const View kept = reader.floats(residual, "residual", kStates);
    reader.require_numel(kept, from.numel, "residual", -1, "x");
    source.residual = kept.data;
    source.residual_dtype = kept.dtype;
  }
  return source;
}

void encode_signs(py::handle x, py::handle residual, py::handle blocks, py::handle scales, py::handle codes,
                  int threads) {
  TensorReader reader("sign_encode");
  std::int64_t numel = 0;
  const CodeSource source = read_source(reader, x, residual, numel);
  const auto rows = read_blocks(reader, "sign_encode", blocks, numel);
  const Codes to = read_codes(reader, "sign_encode", scales, codes, rows.size(), (numel + 7) / 8);
  if (reader.on_gpu()) {
    gpu_check("sign_encode", gpu()->sign_encode(reader.device_index(), rows.data(), count_of(rows), &source,
                                                to.scales, to.codes, reader.stream()));
    return;
  }
  py::gil_scoped_release unlocked;
  sign_encode(rows, source, to.scales, to.codes, threads);
}

void decode_signs(py::handle scales, py::handle codes, py::handle blocks, py::handle out, double weight,
                  bool add, int threads) {
  TensorReader reader("sign_decode");
  const View to = reader.floats(out, "out", kFloats);
  const auto rows = read_blocks(reader, "sign_decode", blocks, to.numel);
  const Codes from = read_codes(reader, "sign_decode", scales, codes, rows.size(), (to.numel + 7) / 8);
  const CodeTarget target{to.data, to.dtype, static_cast<float>(weight), add};
  if (reader.on_gpu()) {
    gpu_check("sign_decode", gpu()->sign_decode(reader.device_index(), rows.data(), count_of(rows),
                                                from.scales, from.codes, &target, reader.stream()));
    return;
  }
  py::gil_scoped_release unlocked;
  sign_decode(rows, from.scales, from.codes, target, threads);
}

void encode_ints(py::handle x, py::handle residual, py::handle blocks, py::handle scales, py::handle codes,
                 int bits, bool stochastic, std::uint64_t seed, int threads) {
  TensorReader reader("int_encode");
  std::int64_t numel = 0;
  const CodeSource source = read_source(reader, x, residual, numel);
  const auto rows = read_blocks(reader, "int_encode", blocks, numel);
  const Codes to = read_codes(reader, "int_encode", scales, codes, rows.size(), (numel * bits + 7) / 8);
  const Rounding rounding{stochastic, seed};
  if (reader.on_gpu()) {
    gpu_check("int_encode", gpu()->int_encode(reader.device_index(), rows.data(), count_of(rows), &source,
                                              bits, &rounding, to.scales, to.codes, reader.stream()));
    return;
  }
  py::gil_scoped_release unlocked;
  int_encode(rows, source, bits, rounding, to.scales, to.codes, threads);
}

void decode_ints(py::handle scales, py::handle codes, py::handle blocks, py::handle out, int bits,
                 double weight, bool add, int threads) {
  TensorReader reader("int_decode");
  const View to = reader.floats(out, "out", kFloats);
  const auto rows = read_blocks(reader, "int_decode", blocks, to.numel);
  const Codes from = read_codes(reader, "int_decode", scales, codes, rows.size(), (to.numel * bits + 7) / 8);
  const CodeTarget target{to.data, to.dtype, static_cast<float>(weight), add};
  if (reader.on_gpu()) {
    gpu_check("int_decode", gpu()->int_decode(reader.device_index(), rows.data(), count_of(rows), from.scales,
                                              from.codes, bits, &target, reader.stream()));
    return;
  }
  py::gil_scoped_release unlocked;
  int_decode(rows, from.scales, from.codes, bits, target, threads);
}

}  // namespace

void bind_codes(py::module_& m) {
  m.def("sign_encode", &encode_signs);
  m.def("sign_decode", &decode_signs);
  m.def("int_encode", &encode_ints);
  m.def("int_decode", &decode_ints);
}

}  // namespace ds::bindings
