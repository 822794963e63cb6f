"""An optimizer whose states are in a store."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_offload.interfaces import Store
from ds_offload.nvme.store import NVMeStore
from ds_offload.paging.paged_states import PagedStates
from ds_offload.paging.pager import Pager
from ds_offload.paging.part_step import step_parts, step_summed_parts, sum_parts
from ds_offload.paging.state_layout import needs_whole
from ds_offload.paging.tensors import local
from ds_offload.undo import UndoLog, put_back

PAGE_BYTES = 64 << 20
"""Default size of a page."""


class PagedOptimizer(Optimizer):
    """Keeps the states of an optimizer in a store, and loads them page by page while it steps.

    While a page is stepped, the next ones are loaded and the previous one is stored. The result is that of the inner
    optimizer, bit for bit, if its result for an element does not depend on where the tensor is cut (ds_core's
    optimizers, torch's with `foreach=True`). Optimizers that need whole tensors work if they say so by a method
    `needs_whole(group)`, as Muon, or by `segment_sums`, as LAMB. A page then has whole tensors, and may be larger.

    `state` behaves like that of every optimizer, but reads from the store: `state[param]` is a copy, which raises when
    it is changed in place. Write within `states_opened(params, write=True)`, or assign a whole dict.

    The options in its own `param_groups` count. The inner optimizer has the same dicts until a state dict is loaded.
    """

    elementwise = True
    """Each element is updated independently of the others, where `needs_whole` does not say otherwise."""

    def __new__(cls, optimizer: Optimizer, *_: Any, **__: Any) -> PagedOptimizer:
        """An optimizer that updates in two passes, as LAMB, also gets the methods of both."""
        in_two_passes = cls is PagedOptimizer and hasattr(optimizer, "segment_sums")
        return super().__new__(_PagedInTwoPasses if in_two_passes else cls)

    def __init__(
        self,
        optimizer: Optimizer,
        store: Store | str | Path,
        *,
        page_bytes: int = PAGE_BYTES,
        num_buffers: int = 4,
        overlap_reads: bool = True,
        overlap_writes: bool = True,
    ) -> None:
        """
        Args:
            optimizer: for example a `CPUAdam`. Do not step it directly.
            store: an `NVMeStore`, a `HostStore`, or a folder on a disk. The optimizer does not close it, but it closes
                the store that it makes for a folder.
            page_bytes: the maximum size of a page, except for one whole tensor.
            num_buffers: number of pages in memory, at least 3 with overlap and 1 without.
            overlap_reads: load the next pages while a page is stepped.
            overlap_writes: store the previous page while a page is stepped.

        Raises:
            ValueError: too few buffers; the optimizer is not element-wise, and does not say what it needs whole (raised
                by the first step).
        """
        least = 1 + overlap_reads + overlap_writes
        if num_buffers < least:
            raise ValueError(
                f"PagedOptimizer: num_buffers={num_buffers}, but it needs {least}: one page is stepped"
                + ", one is loaded" * overlap_reads
                + ", one is stored" * overlap_writes
            )
        self._inner = optimizer
        self.num_buffers = num_buffers
        self._own_store = isinstance(store, (str, Path))
        self._store: Store = NVMeStore(store) if isinstance(store, (str, Path)) else store
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._pager = Pager(
            self._store,
            num_buffers=num_buffers,
            read_ahead=max(1, num_buffers - 2) if overlap_reads else 0,
            write_behind=overlap_writes,
        )
        self._states = PagedStates(optimizer, lambda: self.param_groups, self._pager, page_bytes)
        self._states.adopt(optimizer.state)
        self._undo = UndoLog()
        self._undoable: dict[Tensor, None] = {}
        """Parameters whose last step may be taken back."""
        self.state: Any = self._states
        optimizer.state.clear()

    @property
    def inner(self) -> Optimizer:
        """The optimizer that computes the steps."""
        return self._inner

    def needs_whole(self, group: Mapping[str, Any]) -> bool:
        """Whether the tensors of a group must stay whole on one rank: for Muon, those of its matrices."""
        return not hasattr(self, "segment_sums") and needs_whole(self._inner, group)

    # --- stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps every parameter that has a gradient. `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.commit()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._step(params, None, None)
        return loss

    @torch.no_grad()
    def step_fused(
        self, params: Sequence[Tensor], *, grad_scale: Tensor, out: Sequence[Tensor | None]
    ) -> None:
        """Steps exactly `params` with gradients `p.grad * grad_scale`, and writes a copy of the new `params[i]` to
        `out[i]`, unless None. In one pass over memory if the inner optimizer has `step_fused`.
        """
        if len(out) != len(params):
            raise ValueError(f"step_fused: out has {len(out)} entries, but params has {len(params)}")
        self.commit()
        self._step(params, grad_scale, out)

    # --- steps that may be taken back

    def undo_bytes(self, params: Sequence[Tensor], *, with_values: bool = True) -> int:
        """Returns the bytes of memory that the log of one step of `params` needs. The store keeps a second version of
        their states, which counts if the store keeps it in memory; see `second_bytes`.
        """
        live = [p for p in params if p.grad is not None]
        values = sum(local(p).nbytes for p in live) if with_values else 0
        return values + self._states.bytes_in_memory(live)

    @property
    def second_bytes(self) -> int:
        """Bytes in the store of the second versions of states. None are kept before the first `step_undoable`."""
        return self._pager.second_bytes

    @torch.no_grad()
    def step_undoable(
        self,
        params: Sequence[Tensor],
        *,
        grad_scale: Tensor,
        out: Sequence[Tensor | None],
        with_values: bool = True,
    ) -> None:
        """Steps `params` as `step_fused` does, so that `rollback` can take the step back. If one of them was stepped by
        this method before, all earlier steps become final.

        Args:
            with_values: log the parameters. If False, the caller restores them, and `rollback` only their states.
        """
        live = [p for p in params if p.grad is not None]
        if any(p in self._undoable for p in live):
            self.commit()
        self._states.begin_tentative()
        for param in live:
            self._undoable[param] = None
            self._undo.record(param, None, with_values=with_values)
        self._step(params, grad_scale, out)

    @torch.no_grad()
    def rollback(self, params: Sequence[Tensor] | None = None) -> None:
        """Takes back the last `step_undoable` of each of `params`; of all parameters if None. What was written to `out`
        stays. Parameters whose step is final are left as they are.

        Raises:
            ValueError: the states of one of `params` are in one page with those of a parameter that would stay stepped.
        """
        if not self._undoable:
            return
        chosen = None if params is None else [p for p in params if p in self._undoable]
        self._states.revert(chosen, self._undoable)
        for param, before in self._undo.take(chosen):
            put_back(param, before)
        for param in list(self._undoable) if chosen is None else chosen:
            del self._undoable[param]

    def commit(self) -> None:
        """Makes all steps final."""
        if self._undoable:
            self._states.keep()
            self._undo.clear()
            self._undoable.clear()

    def _step(
        self, params: Sequence[Tensor], grad_scale: Tensor | None, out: Sequence[Tensor | None] | None
    ) -> None:
        live = [p for p in params if p.grad is not None and p.numel()]
        copies = {p: c for p, c in zip(params, out, strict=True) if c is not None} if out is not None else {}
        numbers: dict[Tensor, dict[str, Any]] = {}
        with closing(self._states.visit(live)) as visited:
            for parts in visited:
                numbers |= step_parts(self._inner, self.param_groups, parts, grad_scale, copies)
        self._states.set_numbers(numbers)

    # --- states

    def stored_states(self, param: Tensor) -> tuple[dict[str, torch.dtype], dict[str, Any]]:
        """Returns the dtypes of the element-wise states of a parameter, and its other states, without loading anything.
        Both are empty if it has no states.
        """
        return self._states.stored(param)

    @contextmanager
    def states_opened(self, params: Sequence[Tensor], *, write: bool = False) -> Iterator[None]:
        """Context manager within which `state[p]` of these parameters is an ordinary dict of tensors in memory.

        Args:
            write: store the dicts when the context is left without an exception. New dicts may be made.
        """
        with self._states.opened(params, write=write):
            yield

    @property
    def state_bytes(self) -> int:
        """Bytes of the states in the store."""
        return self._pager.num_bytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the pages in memory."""
        return self._pager.buffer_bytes

    def settle(self) -> None:
        """Waits until all states are stored. Raises the error of an operation that failed."""
        self._pager.settle()

    def close(self) -> None:
        """Drops all states, and frees their memory and their space in the store."""
        self._undoable.clear()
        self._undo.close()
        self._states.clear()
        if self._own_store:
            self._store.close()

    # --- methods of torch.optim.Optimizer, without the wrappers that import torch._dynamo at their first call

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`."""
        inspect.unwrap(Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`."""
        inspect.unwrap(Optimizer.zero_grad)(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; it reads all states into memory."""
        saved: dict[str, Any] = inspect.unwrap(Optimizer.state_dict)(self)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; the states are stored."""
        inspect.unwrap(Optimizer.load_state_dict)(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        loaded = state.pop("state", {})
        self.__dict__.update(state)
        self._undoable.clear()
        self._undo.clear()
        self._states.clear()
        for param, held in loaded.items():
            self._states[param] = held

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a PagedOptimizer cannot be pickled or copied, because its states are in a store: use state_dict(), or "
            "ds_checkpoint.save"
        )


class _PagedInTwoPasses(PagedOptimizer):
    """A `PagedOptimizer` whose inner optimizer has `segment_sums` and `step_segments` (LAMB). All pages are loaded in
    both passes.
    """

    @torch.no_grad()
    def segment_sums(self, params: Sequence[Tensor], *, grad_scale: Tensor) -> Tensor:
        """As the inner optimizer's."""
        inner: Any = self._inner
        self.commit()
        sums: Tensor = inner.segment_sums([], grad_scale=grad_scale)
        sums = sums.new_zeros(len(params), sums.shape[1])
        rows = {p: i for i, p in enumerate(params)}
        numbers: dict[Tensor, dict[str, Any]] = {}
        with closing(self._states.visit([p for p in params if p.grad is not None and p.numel()])) as visited:
            for parts in visited:
                own, new = sum_parts(self._inner, self.param_groups, parts, grad_scale)
                sums[[rows[part.param] for part in parts]] = own
                numbers |= new
        self._states.set_numbers(numbers)
        return sums

    @torch.no_grad()
    def step_segments(self, params: Sequence[Tensor], sums: Tensor, *, out: Sequence[Tensor | None]) -> None:
        """As the inner optimizer's."""
        rows = {p: i for i, p in enumerate(params)}
        copies = {p: c for p, c in zip(params, out, strict=True) if c is not None}
        numbers: dict[Tensor, dict[str, Any]] = {}
        with closing(self._states.visit([p for p in params if p.grad is not None and p.numel()])) as visited:
            for parts in visited:
                own = sums[[rows[part.param] for part in parts]]
                numbers |= step_summed_parts(self._inner, self.param_groups, parts, own, copies)
        self._states.set_numbers(numbers)
