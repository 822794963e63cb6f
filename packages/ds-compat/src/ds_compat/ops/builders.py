"""`deepspeed.ops.op_builder`: nothing is compiled; supported operations are always available."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class OpBuilder:
    """A builder of an operation that ds_core provides."""

    NAME = ""
    BUILD_VAR = ""

    def __init__(self, name: str | None = None) -> None:
        self.name = name or self.NAME

    def is_compatible(self, verbose: bool = False) -> bool:
        return True

    def absolute_name(self) -> str:
        return f"ds_core.{self.NAME}"

    def load(self, verbose: bool = True) -> Any:
        """Returns the module of the operation; nothing is compiled."""
        import ds_core.optim

        return ds_core.optim

    jit_load = load
    builder = load


class UtilsBuilder(OpBuilder):
    NAME = "utils"

    def load(self, verbose: bool = True) -> Any:
        """Returns torch's flatten and unflatten."""
        from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

        return SimpleNamespace(flatten=_flatten_dense_tensors, unflatten=_unflatten_dense_tensors)


class _FilesBuilder(OpBuilder):
    def load(self, verbose: bool = True) -> Any:
        """Returns the module with `aio_handle` and `pin_handle`."""
        import ds_compat.ops.aio

        return ds_compat.ops.aio

    jit_load = load
    builder = load


class _Absent(OpBuilder):
    """An operation that is not supported: `is_compatible` returns False."""

    def is_compatible(self, verbose: bool = False) -> bool:
        return False

    def load(self, verbose: bool = True) -> Any:
        raise RuntimeError(f"the operation {self.NAME} is not part of the installed ds packages")

    jit_load = load
    builder = load


def _make(base: type[OpBuilder], **names: str) -> dict[str, type[OpBuilder]]:
    return {kind: type(kind, (base,), {"NAME": name, "__module__": __name__}) for kind, name in names.items()}


_KINDS: dict[str, Any] = {
    **_make(
        OpBuilder,
        FusedAdamBuilder="fused_adam",
        CPUAdamBuilder="cpu_adam",
        CPUAdagradBuilder="cpu_adagrad",
        CPULionBuilder="cpu_lion",
        FusedLionBuilder="fused_lion",
        FusedLambBuilder="fused_lamb",
    ),
    "UtilsBuilder": UtilsBuilder,
    **_make(_FilesBuilder, AsyncIOBuilder="async_io", PinMemoryBuilder="pin_memory"),
    **_make(
        _Absent,
        GDSBuilder="gds",
        InferenceBuilder="transformer_inference",
        TransformerBuilder="transformer",
        QuantizerBuilder="quantizer",
        FPQuantizerBuilder="fp_quantizer",
        RandomLTDBuilder="random_ltd",
        SparseAttnBuilder="sparse_attn",
        SpatialInferenceBuilder="spatial_inference",
        EvoformerAttnBuilder="evoformer_attn",
        CCLCommBuilder="deepspeed_ccl_comm",
        ShareMemCommBuilder="deepspeed_shm_comm",
    ),
}
globals().update(_KINDS)
ALL_OPS = {kind.NAME: kind() for kind in _KINDS.values()}
COMPATIBLE = {name: op.is_compatible() for name, op in ALL_OPS.items()}
