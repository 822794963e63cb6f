// Conversions between fp32, bf16 and fp16. Included per target.

template <class Src, class Dst>
void cast_range(const void* src, void* dst, std::int64_t numel) {
  auto step = [](const Src* from, Dst* to) { store(to, load(from)); };
  sweep(numel, step, static_cast<const Src*>(src), static_cast<Dst*>(dst));
}
