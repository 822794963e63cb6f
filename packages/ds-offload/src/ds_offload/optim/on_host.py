"""What the optimizers for host memory share: where states are, and the formats of parameters and states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_core import arena, formats, kernels, threads
from ds_core.formats import StepFormats
from ds_core.optim import Batch, FusedOptimizer
from ds_offload.interfaces import KeepsStates
from ds_offload.undo import Undoable

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes of parameters that are updated in fp32 and rounded."""

STATE_DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}
"""Formats of states by name."""

MASTER_BITS = "master_bits"
"""The state with the lower halves of split masters."""

_SPLIT = "_split"
"""Key in the options of a part of a group: whether its parameters have `MASTER_BITS`."""


class OnHost(Undoable, FusedOptimizer):
    """A mixin for the classes of `ds_core.optim`: states on huge pages, steps that can be taken back, and parameters
    on the CPU only, except for those that a store keeps on the device.
    """

    steps_narrow = False
    """Whether 16-bit parameters can be stepped."""

    num_threads: int | None = None
    """Maximum number of threads of a step. None: `torch.get_num_threads()`, or the environment variable DS_CPU_THREADS.
    Set it to leave cores to the workers of a data loader; the result has the same bits.
    """

    cores: Sequence[int] | None = None
    """Cores on which steps compute, `ds_core.threads.bound`; the others are left to the workers of a data loader. None:
    torch's threads, on any core.
    """

    _store: KeepsStates | None = None

    def keep_states_in(self, store: KeepsStates) -> None:
        """Steps the parameters that `store` keeps on the device there, with their states beside them."""
        self._store = store

    def new_state(self, param: Tensor) -> Tensor:
        """Returns a zero-filled state in the arena, or beside a parameter that the store keeps on the device.

        Raises:
            ValueError: the parameter is not on the CPU, or its dtype cannot be stepped.
        """
        return self._new(param, self._state_dtype)

    def _new(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        store = self._store
        if store is not None and (param.device.type != "cpu" or store.state_tier(param) == "device"):
            return torch.zeros_like(param, dtype=dtype)
        name = type(self).__name__
        if param.device.type != "cpu":
            raise ValueError(
                f"{name}: a parameter of shape {tuple(param.shape)} is on {param.device}: keep masters on the host "
                "(ds_zero.shard(..., store=HostStore())), or use the optimizers of ds_core.optim"
            )
        if param.dtype != torch.float32 and not (self.steps_narrow and param.dtype in NARROW):
            able = "fp32, bf16 and fp16" if self.steps_narrow else "fp32"
            raise ValueError(
                f"{name}: a parameter of shape {tuple(param.shape)} is {param.dtype}: {name} steps {able} parameters; "
                "shard the model with ds_zero, which creates fp32 masters, or convert it with model.float()"
            )
        return arena.empty(param.numel(), dtype).zero_().as_strided(param.size(), param.stride())

    def _step_group(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        out: Sequence[Tensor | None] | None,
        grad_scale: float,
        checksums: kernels.Checksums | None = None,
    ) -> None:
        with threads.bound(self.cores), threads.limited(self.num_threads):
            super()._step_group(group, params, out, grad_scale, checksums)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "num_threads": self.num_threads, "cores": self.cores}


class ElementWise(OnHost):
    """`OnHost` for element-wise optimizers, with a choice of formats. Arithmetic is in fp32, in one pass over memory.

    Parameters are fp32, bf16 or fp16. 16-bit ones are widened, updated, and rounded to nearest even, so that updates
    are lost that are smaller than half the distance of two 16-bit numbers. fp32 masters, as ds_zero makes them, keep
    them, and so do split masters.

    `state_dtype` of the constructors:

    * "fp32".
    * "bf16", rounded stochastically: with a decay of 0.999, a second moment that is rounded to nearest would not move.
    * "int8", for Adam: see `ds_core.formats`. 1 byte for each moment and element.
    * torch.bfloat16: rounded to nearest even, as by the optimizers of ds_core.optim.

    Random bits are a hash of the number that is rounded, of `seed` and of the step: neither threads nor the place
    where a tensor is cut change the result. Of 8-bit states, it must be cut at multiples of 32 elements, as
    ds_zero and `PagedOptimizer` do.

    `split_masters`: the state "master_bits", int16, extends bf16 parameters to fp32 masters, which are updated; the
    parameter is the master rounded to nearest, ties away from zero. `join_master` returns it. ds_zero then stores
    masters of bf16 parameters in bf16, and saves them in fp32. fp32 parameters have no such state.
    """

    steps_narrow = True
    sums_narrow = True
    formats: ClassVar[tuple[str, ...]] = ("fp32", "bf16")
    """Names of the formats of states."""

    def _choose_formats(self, state_dtype: torch.dtype | str, split_masters: bool, seed: int) -> torch.dtype:
        """Sets the formats before the constructor of the base class runs, and returns the dtype of the states."""
        name = type(self).__name__
        if isinstance(state_dtype, str):
            if state_dtype not in self.formats:
                able = ", ".join(repr(f) for f in self.formats)
                raise ValueError(f"{name}: state_dtype is {state_dtype!r}: it must be one of {able}")
            dtype = STATE_DTYPES[state_dtype]
        else:
            dtype = state_dtype
        if dtype == torch.float16:
            raise ValueError(
                f"{name}: state_dtype is {dtype}: squares of gradients below 2.4e-4 are 0 in fp16, and divisions by "
                'their roots fail; use "bf16", which has the range of fp32'
            )
        self._stochastic = isinstance(state_dtype, str) and dtype != torch.float32
        self._split, self._seed = split_masters, seed
        return dtype

    @property
    def state_format(self) -> str:
        """The name of the format of states, such as "int8"."""
        return next(name for name, dtype in STATE_DTYPES.items() if dtype == self._state_dtype)

    @property
    def split_masters(self) -> bool:
        """Whether bf16 parameters have the state "master_bits"."""
        return self._split

    def join_master(self, param: Tensor, master_bits: Tensor) -> Tensor:
        """Returns the fp32 master of a bf16 parameter."""
        return formats.join_master(param, master_bits)

    def split_master(self, master: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the bf16 parameter and the master bits of an fp32 master."""
        return formats.split_master(master)

    @property
    def initial_states(self) -> tuple[str, ...]:
        """Names of states that a parameter may have before its first step, without the others."""
        return (MASTER_BITS,) if self._split else ()

    def new_named_state(self, param: Tensor, name: str) -> Tensor:
        """Returns a zero-filled state of this name in the arena."""
        return self._new(param, torch.int16) if name == MASTER_BITS else self.new_state(param)

    def _prepare(self, param: Tensor, group: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
        if self._split and param.dtype == torch.float16:
            raise ValueError(
                f"{type(self).__name__}: split_masters is set, but a parameter of shape {tuple(param.shape)} is "
                "torch.float16, of which an fp32 master is no extension: use bf16, or remove split_masters"
            )
        held = self.state.get(param) or {}
        # Alone, they are those of the initial values: the first step is that of a parameter without states.
        initial = held.pop(MASTER_BITS) if held.keys() == {MASTER_BITS} else None
        fresh = not held
        state, step = super()._prepare(param, group)
        if MASTER_BITS in self._names(group):
            state = self.state[param]
            if initial is not None:
                state[MASTER_BITS] = initial
            elif MASTER_BITS not in state:
                state[MASTER_BITS] = self.new_named_state(param, MASTER_BITS)
        if step is not None and self._stochastic and self._names(group):
            # The key of stochastic rounding needs the number of the step, which SGD does not count.
            if "step" not in state:
                state["step"] = torch.tensor(0.0 if fresh else 1.0)
            step = None
        return state, step

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        names = super()._names(group)
        return (*names, MASTER_BITS) if self._split and group.get(_SPLIT, True) else names

    def _step_group(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        out: Sequence[Tensor | None] | None,
        grad_scale: float,
        checksums: kernels.Checksums | None = None,
    ) -> None:
        if not self._split or all(p.dtype != torch.float32 for p in params):
            super()._step_group(group, params, out, grad_scale, checksums)
            return
        for split in (True, False):  # fp32 parameters are their own masters
            rows = [i for i, p in enumerate(params) if (p.dtype != torch.float32) == split]
            members, copies = [params[i] for i in rows], None if out is None else [out[i] for i in rows]
            sums = (
                None
                if checksums is None
                else ([checksums[0][i] for i in rows], [checksums[1][i] for i in rows])
            )
            super()._step_group({**group, _SPLIT: split}, members, copies, grad_scale, sums)

    def checksummed_states(self, param: Tensor) -> tuple[str, ...]:
        """Returns the names of the element-wise states of one parameter."""
        names = super().checksummed_states(param)
        return names if param.dtype != torch.float32 else tuple(n for n in names if n != MASTER_BITS)

    def _kept_names(self) -> tuple[str, ...]:
        return (*self.state_names, MASTER_BITS) if self._split else self.state_names

    def _formats(self, batch: Batch) -> StepFormats | None:
        return StepFormats(
            master_bits=batch.states.get(MASTER_BITS),
            rounding=formats.rounding_key(self._seed, batch.step) if self._stochastic else None,
        )

    def _loaded_states(self, param: Tensor, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies saved states; those of another format are converted."""
        moments = [name for name in self.state_names if name in saved]
        packed = [saved[name].dtype == torch.uint8 for name in moments]
        values = {name: value.detach().to(param.device) for name, value in saved.items()}
        if all(packed) and packed and self._state_dtype != torch.uint8:
            values |= zip(moments, formats.unpack_moments(*(values[name] for name in moments)), strict=True)
        elif self._state_dtype == torch.uint8 and moments and not any(packed):
            first, second = (values[name].float() for name in moments)
            key = formats.rounding_key(self._seed, 0)
            values |= zip(moments, formats.pack_moments(first, second, key), strict=True)
        return {name: self.new_named_state(param, name).copy_(value) for name, value in values.items()}

    def __getstate__(self) -> dict[str, Any]:
        own = {"_stochastic": self._stochastic, "_split": self._split, "_seed": self._seed}
        return {**super().__getstate__(), **own}
