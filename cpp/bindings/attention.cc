#include "ds/block_attention.h"
#include "tensor.h"

namespace ds::bindings {
namespace {

constexpr const char* kForward = "block_attention_forward";
constexpr const char* kBackward = "block_attention_backward";

using Sizes = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

// Reads the tensors of a job, and checks that their sizes and the columns fit.
BlockAttention read_job(TensorReader& reader, const char* function, const py::tuple& tensors,
                        const Sizes& sizes, float scale, bool causal) {
  const auto [batch, heads, kv_heads, rows, block, dim] = sizes;
  if (batch < 1 || heads < 1 || kv_heads < 1 || rows < 1 || heads % kv_heads != 0 || block < 16 || dim < 16 ||
      block % 16 != 0 || dim % 16 != 0) {
    throw py::value_error(std::string(function) +
                          ": block and dim must be multiples of 16, and heads of kv_heads");
  }
  const View q = reader.floats(tensors[0], "q", kFloats);
  const View k = reader.floats(tensors[1], "k", only(q.dtype)),
             v = reader.floats(tensors[2], "v", only(q.dtype));
  const std::int64_t tokens = rows * block;
  reader.require_numel(q, batch * heads * tokens * dim, "q", -1, "the sizes");
  reader.require_numel(k, batch * kv_heads * tokens * dim, "k", -1, "the sizes");
  reader.require_numel(v, k.numel, "v", -1, "k");
  const float* bias = nullptr;
  if (!tensors[3].is_none()) {
    const View added = reader.floats(tensors[3], "bias", kFloat32);
    reader.require_numel(added, batch * tokens, "bias", -1, "the sizes");
    bias = static_cast<const float*>(added.data);
  }
  const View offsets = reader.typed(tensors[4], "offsets", dlpack::kInt, 64, "int64");
  const View columns = reader.typed(tensors[5], "columns", dlpack::kInt, 64, "int64");
  reader.require_numel(offsets, heads * rows + 1, "offsets", -1, "the block rows");
  if (reader.on_gpu()) throw py::value_error(std::string(function) + ": tensors must be on the CPU");
  const auto* begins = static_cast<const std::int64_t*>(offsets.data);
  const auto* chosen = static_cast<const std::int64_t*>(columns.data);
  bool fits = begins[0] == 0 && begins[heads * rows] == columns.numel;
  for (std::int64_t i = 0; fits && i < heads * rows; ++i) fits = begins[i] < begins[i + 1];
  for (std::int64_t i = 0; fits && i < columns.numel; ++i) fits = chosen[i] >= 0 && chosen[i] < rows;
  if (!fits) {
    throw py::value_error(std::string(function) +
                          ": offsets must grow, and columns be block rows of the tensors");
  }
  return {.q = q.data,
          .k = k.data,
          .v = v.data,
          .bias = bias,
          .batch = batch,
          .heads = heads,
          .kv_heads = kv_heads,
          .rows = rows,
          .block = block,
          .dim = dim,
          .scale = scale,
          .causal = causal,
          .offsets = begins,
          .columns = chosen,
          .dtype = q.dtype};
}

void* like_q(TensorReader& reader, const BlockAttention& job, py::handle tensor, const char* name,
             std::int64_t numel) {
  const View view = reader.floats(tensor, name, only(job.dtype));
  reader.require_numel(view, numel, name, -1, "the sizes");
  return view.data;
}

float* sums_of(TensorReader& reader, py::handle tensor, std::int64_t numel) {
  const View view = reader.floats(tensor, "lse", kFloat32);
  reader.require_numel(view, numel, "lse", -1, "the sizes");
  return static_cast<float*>(view.data);
}

void forward(const py::tuple& tensors, const Sizes& sizes, float scale, bool causal, py::handle out,
             py::handle lse, int threads) {
  TensorReader reader(kForward);
  const BlockAttention job = read_job(reader, kForward, tensors, sizes, scale, causal);
  const std::int64_t queries = job.batch * job.heads * job.rows * job.block;
  void* values = like_q(reader, job, out, "out", queries * job.dim);
  float* sums = sums_of(reader, lse, queries);
  py::gil_scoped_release unlocked;
  block_attention_forward(job, values, sums, threads);
}

void backward(const py::tuple& tensors, const Sizes& sizes, float scale, bool causal, const py::tuple& grads,
              int threads) {
  TensorReader reader(kBackward);
  const BlockAttention job = read_job(reader, kBackward, tensors, sizes, scale, causal);
  const std::int64_t tokens = job.rows * job.block, queries = job.batch * job.heads * tokens;
  const std::int64_t keys = job.batch * job.kv_heads * tokens * job.dim;
  const BlockAttentionGrads all = {.out = like_q(reader, job, grads[0], "out", queries * job.dim),
                                   .lse = sums_of(reader, grads[1], queries),
                                   .grad = like_q(reader, job, grads[2], "grad", queries * job.dim),
                                   .dq = like_q(reader, job, grads[3], "dq", queries * job.dim),
                                   .dk = like_q(reader, job, grads[4], "dk", keys),
                                   .dv = like_q(reader, job, grads[5], "dv", keys)};
  py::gil_scoped_release unlocked;
  block_attention_backward(job, all, threads);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def(kForward, &forward);
  m.def(kBackward, &backward);
}

}  // namespace ds::bindings
