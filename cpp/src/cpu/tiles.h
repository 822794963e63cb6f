// Updates of tensors in the formats of ds/formats.h, [Note: update in tiles].
#pragma once

#include <algorithm>
#include <span>

#include "cpu/elementwise.h"
#include "dispatch/kernel_table.h"
#include "ds/formats.h"
#include "ds/update.h"

namespace ds {

// Buffers for one tile, and the tensor that the ordinary kernel updates in them.
class Tile {
 public:
  static constexpr std::int64_t kNumel = 512;
  static_assert(kNumel % kMomentBlock == 0 && ChunkPlan::kCutNumel % kMomentBlock == 0);

  // The elements [begin, begin + numel) of `t`; `begin` is a multiple of kMomentBlock.
  Tile(const KernelTable& table, const UpdateTensor& t, const TensorFormat& format, std::int64_t begin,
       std::int64_t numel)
      : table_(table), format_(format), whole_(t), tensor_(t), numel_(numel) {
    whole_.param = static_cast<float*>(at(t.param, format.param_dtype, begin));
    whole_.grad = tensor_.grad = at(t.grad, t.grad_dtype, begin);
    whole_.out = tensor_.out = at(t.out, t.out_dtype, begin);
    tensor_.param = whole_.param;
    tensor_.numel = numel;
    if (format_.low != nullptr) format_.low += begin;
    for (int i = 0; i < 2; ++i) {
      whole_.states[i] = tensor_.states[i] = at(t.states[i], t.state_dtype, begin);
    }
  }

  UpdateTensor& widened() {
    if (format_.param_dtype != DType::kF32 || format_.away) tensor_.out = nullptr;
    if (format_.param_dtype != DType::kF32) {
      tensor_.param = param_;
      if (format_.low != nullptr) {
        table_.join_master(reinterpret_cast<const BF16*>(whole_.param), format_.low, param_, numel_);
      } else {
        cast(format_.param_dtype, DType::kF32, whole_.param, param_);
      }
    }
    if (!format_.stochastic) return tensor_;
    tensor_.state_dtype = DType::kF32;
    for (int i = 0; i < 2; ++i) {
      if (whole_.states[i] == nullptr) continue;
      tensor_.states[i] = states_[i];
      cast(DType::kBF16, DType::kF32, whole_.states[i], states_[i]);
    }
    return tensor_;
  }

  void narrow(const RoundingKeys& keys) {
    if (format_.param_dtype != DType::kF32) {
      if (format_.low != nullptr) {
        table_.split_master(param_, reinterpret_cast<BF16*>(whole_.param), format_.low, numel_);
      } else {
        cast(DType::kF32, format_.param_dtype, param_, whole_.param);
      }
      if (whole_.out != nullptr) cast(format_.param_dtype, whole_.out_dtype, whole_.param, whole_.out);
    } else if (format_.away && whole_.out != nullptr) {
      table_.round_away(whole_.param, static_cast<BF16*>(whole_.out), numel_);
    }
    if (!format_.stochastic) return;
    for (int i = 0; i < 2; ++i) {
      if (whole_.states[i] == nullptr) continue;
      table_.round_stochastically(states_[i], static_cast<BF16*>(whole_.states[i]), keys.state[i], numel_);
    }
  }

 private:
  void cast(DType from, DType to, const void* source, void* target) const {
    table_.cast[static_cast<int>(from)][static_cast<int>(to)](source, target, numel_);
  }

  const KernelTable& table_;
  TensorFormat format_;
  UpdateTensor whole_;   // at the tile
  UpdateTensor tensor_;  // what is updated
  std::int64_t numel_;
  alignas(64) float param_[kNumel];
  alignas(64) float states_[2][kNumel];
};

struct NoDirect {
  bool operator()(const UpdateTensor&, const TensorFormat&, std::int64_t, std::int64_t) const {
    return false;
  }
};

// Updates [begin, begin + numel) of a tensor that is not plain. `direct` may do it by a kernel for its
// format, and returns whether it did.
template <class Update, class Direct>
void update_formatted(const KernelTable& table, const UpdateTensor& t, const TensorFormat& format,
                      std::int64_t begin, std::int64_t numel, const RoundingKeys& keys, Update update,
                      Direct direct) {
  if (direct(t, format, begin, numel)) return;
  for (const std::int64_t end = begin + numel; begin < end; begin += Tile::kNumel) {
    const std::int64_t n = std::min(Tile::kNumel, end - begin);
    Tile tile(table, t, format, begin, n);
    update(tile.widened(), 0, n);
    tile.narrow(keys);
  }
}

// Calls update(tensor, begin, numel) for pieces that cover every element once; what is not plain is updated
// by update_formatted. `formats` has one entry for each tensor, or none: then all are plain. With `sums`,
// also one for each tensor or none, [Note: checksums in the pass].
template <class Update, class Direct = NoDirect>
void for_each_formatted_update(std::span<const UpdateTensor> tensors, int num_threads,
                               std::span<const UpdateSums> sums, std::span<const TensorFormat> formats,
                               const RoundingKeys& keys, Update update, Direct direct = {}) {
  const KernelTable& table = kernels();
  for_each_piece(tensors, num_threads, [&](const UpdateTensor& t, std::int64_t begin, std::int64_t numel) {
    const auto index = static_cast<std::size_t>(&t - tensors.data());
    const TensorFormat format = formats.empty() ? TensorFormat{} : formats[index];
    auto run = [&](const UpdateTensor&, std::int64_t from, std::int64_t n) {
      if (format.plain()) {
        update(t, from, n);
      } else {
        update_formatted(table, t, format, from, n, keys, update, direct);
      }
    };
    if (sums.empty()) {
      run(t, begin, numel);
    } else {
      update_with_sums(table.checksum, t, format, sums[index], begin, numel, run);
    }
  });
}

// An optimizer with one state at most; `table` is its part of the kernel table.
template <class Scalars, std::size_t kNumStates>
void one_state_step(const Scalars& scalars,
                    const OneStateFn<Scalars> (&table)[kNumStates][kNumDTypes][kNumOutKinds],
                    std::span<const UpdateTensor> tensors, int num_threads, std::span<const UpdateSums> sums,
                    std::span<const TensorFormat> formats, const RoundingKeys& keys) {
  for_each_formatted_update(
      tensors, num_threads, sums, formats, keys,
      [&](const UpdateTensor& t, std::int64_t begin, std::int64_t numel) {
        const int state = t.states[0] == nullptr ? kNumStateKinds : state_kind(t.state_dtype);
        const OneStateFn<Scalars> fn = table[state][grad_kind(t.grad_dtype)][out_kind(t.out, t.out_dtype)];
        fn(scalars, t.param + begin, at(t.states[0], t.state_dtype, begin), at(t.grad, t.grad_dtype, begin),
           at(t.out, t.out_dtype, begin), numel);
      });
}

}  // namespace ds
