"""Reduce-scatter of gradients in 4 bits whose errors are fed back: LoCo."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.feedback import DTYPES, ResidualError
from ds_comm.compress.integer import IntCompressor
from ds_comm.compress.interfaces import Compressor
from ds_comm.exchange.channel import Work
from ds_comm.exchange.hierarchy import Hierarchy
from ds_comm.exchange.quantized import QuantizedReduceScatter

_HOPS = 2


class LoCoReduceScatter(QuantizedReduceScatter):
    """`QuantizedReduceScatter` with error feedback (Xie et al. 2024, LoCo, arXiv 2407.04480, algorithm 1).

    What a rank sends is its gradient plus an error e, rounded to nearest; then e = err_beta e + (1 - err_beta) times
    what rounding lost. With two hops there is an error for each. Every `reset_steps` reductions the errors begin anew
    with zeros, so that what belongs to old parameters is not fed back for ever. Equations: docs/notes/zeropp.md.

    The errors of a rank have as many elements as what it sends: all gradients that it reduces, and those of one
    rank in `local_size` for the second hop. They belong to elements, so a call must know which gradients it has:
    ds_zero asks with `for_bucket`; FSDP2 calls the object itself, which must then be one for each module.
    """

    def __init__(
        self,
        compressor: Compressor | None = None,
        hierarchy: Hierarchy | None = None,
        *,
        local_size: int = 1,
        err_beta: float = 0.8,
        reset_steps: int = 1024,
        residual_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Args:
        compressor: None: `IntCompressor(bits=4)`, rounded to nearest.
        hierarchy: as for `QuantizedReduceScatter`.
        local_size: as for `QuantizedReduceScatter`.
        err_beta: weight of earlier errors, in [0, 1); 0: only the error of the last reduction.
        reset_steps: reductions of the same gradients after which their errors are set to zero.
        residual_dtype: of the errors, torch.float32 or torch.bfloat16.
        """
        super().__init__(
            IntCompressor(bits=4) if compressor is None else compressor, hierarchy, local_size=local_size
        )
        if not 0.0 <= err_beta < 1.0:
            raise ValueError(f"LoCoReduceScatter: err_beta must lie in [0, 1), but is {err_beta}")
        if reset_steps < 1:
            raise ValueError(f"LoCoReduceScatter: reset_steps must be at least 1, but is {reset_steps}")
        if residual_dtype not in DTYPES:
            raise ValueError(
                "LoCoReduceScatter: residual_dtype must be torch.float32 or torch.bfloat16, but is "
                f"{residual_dtype}"
            )
        self.err_beta, self.reset_steps, self.residual_dtype = err_beta, reset_steps, residual_dtype
        self._errors: dict[str, _Errors] = {}

    def state_bytes(self, numel: int, dtype: torch.dtype, size: int) -> int:
        """Returns the bytes that are kept between calls whose input has `numel` elements, among `size` ranks."""
        second = numel // self._local_size if self._local_size > 1 else 0
        return (numel + second) * self.residual_dtype.itemsize

    def for_bucket(self, name: str | None) -> Callable[..., Work | None]:
        """Returns the collective with the errors of the gradients `name`, which are the same elements in every call.
        None: of gradients that are reduced once more only to be looked at; nothing is fed back.
        """
        return super().__call__ if name is None else partial(self.reduce_bucket, name)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any = dist.ReduceOp.SUM,
        async_op: bool = False,
    ) -> Work | None:
        """As `QuantizedReduceScatter`. All calls of one object must have the same elements.

        Raises:
            ValueError: another number of elements than in the calls before.
        """
        return self.reduce_bucket("", output_tensor, input_tensor, group, op, async_op)

    @torch.no_grad()
    def reduce_bucket(
        self,
        name: str,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any = dist.ReduceOp.SUM,
        async_op: bool = False,
    ) -> Work | None:
        """Reduces the gradients `name`."""
        errors = self._errors.setdefault(name, _Errors())
        if errors.loaded and errors.numel != input_tensor.numel():
            warnings.warn(
                f"LoCoReduceScatter: the errors of {name!r} that were loaded have {errors.numel} elements, but its "
                f"gradients {input_tensor.numel()}: they begin anew with zeros",
                stacklevel=2,
            )
            errors = self._errors[name] = _Errors()
        errors.loaded = False
        if errors.numel not in (0, input_tensor.numel()):
            raise ValueError(
                f"LoCoReduceScatter: {input_tensor.numel()} gradients, but {errors.numel} in the reductions before: "
                "errors belong to elements, so use an object for each module"
            )
        errors.numel = input_tensor.numel()
        if errors.calls % self.reset_steps == 0:
            errors.hops = [None] * _HOPS
        errors.calls += 1
        first, second = (partial(self._encode_with_error, errors, hop) for hop in range(_HOPS))
        return self._start(output_tensor, input_tensor, group, op, async_op, (first, second))

    def _encode_with_error(
        self,
        errors: _Errors,
        hop: int,
        slices: Tensor,
        payloads: Sequence[Tensor],
        blocks: Blocks,
        seed: int,
    ) -> None:
        held = errors.hops[hop]
        if held is None:
            held = torch.zeros(slices.shape, dtype=self.residual_dtype, device=slices.device)
            errors.hops[hop] = held
        for i, (part, payload, error) in enumerate(zip(slices, payloads, held, strict=True)):
            before = error.clone()
            self.compressor.encode(part, payload, blocks, residual=error, seed=seed + (i << 32))
            # A gradient that is not finite makes its step be skipped; its error must not stay for the steps after it.
            error.nan_to_num_(0.0, 0.0, 0.0)
            error.mul_(1.0 - self.err_beta).add_(before, alpha=self.err_beta)

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's errors, without copying them. They belong to this rank of as many ranks."""
        buckets = {
            name: {"numel": errors.numel, "calls": errors.calls, "hops": list(errors.hops)}
            for name, errors in self._errors.items()
        }
        return {**super().state_dict(), "buckets": buckets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads `state_dict()` of the same rank of as many ranks. An empty state begins without errors.

        Raises ResidualError if a hop's errors do not have the number of elements that the state says.
        """
        loaded = {}
        for name, saved in state.get("buckets", {}).items():
            first = saved["hops"][0]
            if first is not None and first.numel() != saved["numel"]:
                raise ResidualError(
                    f"LoCoReduceScatter: the errors of {name!r} have {first.numel()} elements, but its gradients "
                    f"{saved['numel']}"
                )
            hops = [None if hop is None else hop.to(self.residual_dtype, copy=True) for hop in saved["hops"]]
            loaded[name] = _Errors(saved["numel"], saved["calls"], hops)
            loaded[name].loaded = True
        super().load_state_dict(state)
        self._errors = loaded


class _Errors:
    """What rounding lost, of one set of gradients."""

    def __init__(
        self, numel: int = 0, calls: int = 0, hops: Sequence[Tensor | None] = (None,) * _HOPS
    ) -> None:
        self.numel = numel
        """Elements of each reduction; 0: none was made."""
        self.loaded = False
        """Whether they were loaded, and no reduction was made since."""
        self.calls = calls
        self.hops = list(hops)
        """One row for each slice that is sent in the hop; None: zeros."""
