"""The mapping from parameters to their states, of which a store has the element-wise ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_offload.interfaces import Tier
from ds_offload.paging.pager import Pager
from ds_offload.paging.pages import Part, Sized, divide
from ds_offload.paging.state_layout import StateLayout, needs_whole, probe, probe_whole
from ds_offload.paging.tensors import flat, flat_as, like, local

State = dict[str, Any]


@dataclass(frozen=True)
class LoadedPart:
    """A range of elements of a parameter, with its states in memory."""

    param: Tensor
    group: int
    """Index of the group of the parameter."""
    start: int
    numel: int
    states: Mapping[str, Tensor]
    """Views of the page: 1-D, or with the shape of a parameter that must be whole."""
    numbers: Mapping[str, Any] | None
    """States that are no ranges of elements. None: the parameter has no state yet, and `states` has any values."""
    given: frozenset[str] | None = None
    """The parameter was not stepped yet: the names of its states, the rest of `states` has any values."""
    whole: bool = False
    """Whether it is all of a parameter that the optimizer must see in its own shape."""


class PagedStates(MutableMapping[Tensor, State]):
    """Parameter -> states, as in `torch.optim.Optimizer.state`.

    `states[param]` reads the states from the store. They are inference tensors, of which torch refuses changes in
    place, because a change of the copy would be lost. Within `opened` they are ordinary tensors.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        groups: Callable[[], Sequence[Mapping[str, Any]]],
        pager: Pager,
        page_bytes: int,
    ) -> None:
        """`groups` returns the parameter groups."""
        self._optimizer, self._groups = optimizer, groups
        self._pager, self._page_bytes = pager, page_bytes
        self._params: list[Tensor] = []
        """Parameters that have places in pages, in the order of the pages."""
        self._index: dict[Tensor, int] = {}
        """Parameter -> index in `_params`."""
        self._pages: list[list[int]] = []
        """For each of them the indices of its pages."""
        self._numbers: dict[Tensor, State] = {}
        """The parameters that have states -> those states that are no ranges of elements."""
        self._given: dict[Tensor, frozenset[str]] = {}
        """Those of them that were not stepped yet -> the names of their element-wise states, `initial_states` of the
        optimizer or some of them."""
        self._open: dict[Tensor, State] = {}
        self._new: dict[Tensor, State] = {}
        """Dicts of parameters without states, that were handed out and may have been filled."""
        self._layouts: dict[tuple[int, torch.dtype, torch.device, bool], StateLayout] = {}
        self._group_numbers: dict[Tensor, int] = {}
        self._before: dict[Tensor, State] = {}
        self._given_before: dict[Tensor, frozenset[str]] = {}
        """`_numbers` and `_given` before the steps that may be taken back."""

    # --- for steps

    def visit(self, params: Sequence[Tensor]) -> Generator[Sequence[LoadedPart], None, None]:
        """Yields the parts of `params` page by page, with their states in memory, and stores each page when the next
        one is asked for. Close the generator if the loop may raise: the page at which it raised is not stored.
        """
        self._store_new()
        self._place(params)
        wanted = {self._index[p]: p for p in params}
        without_pages = [
            LoadedPart(
                p, self._group_of(p), 0, local(p).numel(), {}, self._numbers.get(p), whole=self._is_whole(p)
            )
            for index, p in wanted.items()
            if not self._pages[index]
        ]
        if without_pages:
            yield without_pages
        for number in sorted({page for index in wanted for page in self._pages[index]}):
            parts = self._pager.page(number).parts
            known = any(self._params[p.param] in self._numbers for p in parts)
            memory = self._pager.open(number, load=known, stepping=True)
            try:
                yield [
                    self._loaded(wanted[part.param], part, memory) for part in parts if part.param in wanted
                ]
            except BaseException:
                self._pager.close(number, written=False)
                raise
            self._pager.close(number, written=True)

    def _loaded(self, param: Tensor, part: Part, memory: Tensor) -> LoadedPart:
        states = {name: part.state(memory, name) for name in part.offsets}
        whole = self._is_whole(param)
        if whole:
            own = local(param)
            states = {name: state.as_strided(own.size(), own.stride()) for name, state in states.items()}
        numbers, given = self._numbers.get(param), self._given.get(param)
        return LoadedPart(param, self._group_of(param), part.start, part.numel, states, numbers, given, whole)

    def set_numbers(self, numbers: Mapping[Tensor, State]) -> None:
        """Sets the states that are no ranges of elements, after all parts of these parameters were stepped."""
        self._numbers.update(numbers)
        for param in numbers:
            self._given.pop(param, None)

    # --- steps that may be taken back

    def begin_tentative(self) -> None:
        """Notes the present states, so that `revert` can return to them; see [Note: two versions of a page]."""
        if not self._pager.is_tentative:
            self._store_new()
            self._before, self._given_before = dict(self._numbers), dict(self._given)
            self._pager.begin_tentative()

    def keep(self) -> None:
        """Makes the states final."""
        self._pager.keep()
        self._before.clear()
        self._given_before.clear()

    def revert(self, params: Sequence[Tensor] | None, stepped: Collection[Tensor]) -> None:
        """Returns to the noted states of `params`; of all parameters if None.

        Args:
            stepped: the parameters whose steps may be taken back.

        Raises:
            ValueError: a page has states of one of `params` and of another stepped parameter.
        """
        if params is None:
            self._pager.revert()
            self._numbers, self._before = self._before, {}
            self._given, self._given_before = self._given_before, {}
            return
        indices = {self._index[p] for p in params if p in self._index}
        pages = {page for index in indices for page in self._pages[index]}
        kept = {self._index[p] for p in stepped if p in self._index} - indices
        shared = [page for page in pages if any(p.param in kept for p in self._pager.page(page).parts)]
        if shared:
            raise ValueError(
                f"rollback of {len(params)} parameters: page {shared[0]} also has states of parameters that would "
                "stay stepped. Take them back, too, or use pages (page_bytes) that parameters do not share"
            )
        self._pager.revert(pages)
        for param in params:
            if param in self._before:
                self._numbers[param] = self._before[param]
            else:
                self._numbers.pop(param, None)
            if param in self._given_before:
                self._given[param] = self._given_before[param]

    # --- for everything else

    def adopt(self, states: Mapping[Tensor, State]) -> None:
        """Takes over states that an optimizer has made before its first step. They are stored by the next step."""
        self._new.update({p: state for p, state in states.items() if state})

    def stored(self, param: Tensor) -> tuple[dict[str, torch.dtype], State]:
        """See `PagedOptimizer.stored_states`."""
        self._store_new()
        if param not in self._numbers:
            return {}, {}
        return self._held_dtypes(param), dict(self._numbers[param])

    def bytes_in_memory(self, params: Sequence[Tensor]) -> int:
        """Returns the bytes of the element-wise states of `params` that the store keeps in addressable memory. Those of
        parameters that were never stepped have no place yet and do not count.
        """
        total = 0
        for param in params:
            index = self._index.get(param)
            itemsize = sum(dtype.itemsize for dtype in self._layout_of(param).dtypes.values())
            for number in self._pages[index] if index is not None else ():
                if self._pager.is_in_memory(number):
                    parts = self._pager.page(number).parts
                    total += itemsize * sum(part.numel for part in parts if part.param == index)
        return total

    @contextmanager
    def opened(self, params: Sequence[Tensor], *, write: bool = False) -> Iterator[None]:
        """See `PagedOptimizer.states_opened`."""
        self._store_new()
        opened = {p: self._read(p) for p in params}
        self._open.update(opened)
        try:
            yield
        finally:
            for p in params:
                self._open.pop(p, None)
        if write:
            self._write(opened)

    def __getitem__(self, param: Tensor) -> State:
        if param in self._open:
            return self._open[param]
        if param not in self._numbers:
            return self._new.setdefault(param, {})
        with torch.inference_mode():
            return self._read(param)

    def __setitem__(self, param: Tensor, state: State) -> None:
        if param in self._open:
            self._open[param].clear()
            self._open[param].update(state)
            return
        if param in self._index:
            self._write({param: dict(state)})
        else:  # places are chosen by the next step, for all parameters together
            self._new[param] = dict(state)

    # As of a defaultdict: only `[]` makes a dict.

    def get(self, param: Tensor, default: Any = None) -> Any:
        """Returns the states of a parameter, or `default` if it has none."""
        if param not in self:
            return default
        return self[param]

    def pop(self, param: Tensor, *default: Any) -> Any:
        """Removes and returns the states of a parameter; `default` if it has none.

        Raises:
            KeyError: it has none, and there is no default.
        """
        if param not in self and default:
            return default[0]
        state = self[param]
        del self[param]
        return state

    def __delitem__(self, param: Tensor) -> None:
        if param not in self:
            raise KeyError(param)
        self._new.pop(param, None)
        self._numbers.pop(param, None)
        self._given.pop(param, None)
        self._open.pop(param, None)

    def __contains__(self, param: object) -> bool:
        return param in self._numbers or bool(self._new.get(param)) or bool(self._open.get(param))  # type: ignore[call-overload]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(
            [*self._numbers, *(p for p, state in self._new.items() if state and p not in self._numbers)]
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def clear(self) -> None:
        """Drops all states and frees their pages."""
        self._pager.destroy()
        self._params.clear()
        self._pages.clear()
        every = (self._index, self._numbers, self._given, self._open, self._new, self._layouts)
        for held in (*every, self._group_numbers, self._before, self._given_before):
            held.clear()

    # --- reading and writing whole states

    def _read(self, param: Tensor) -> State:
        """Returns copies of the states; empty if there are none."""
        if param not in self._numbers:
            return self._new.pop(param, {})
        own = local(param)
        made: State = {
            name: torch.empty_like(own, dtype=dtype) for name, dtype in self._held_dtypes(param).items()
        }
        for number, part in self._parts_of(param):
            memory = self._pager.open(number)
            for name in made:
                flat(made[name])[part.start : part.start + part.numel].copy_(part.state(memory, name))
            self._pager.close(number, written=False)
        copied = {n: v.clone() if isinstance(v, Tensor) else v for n, v in self._numbers[param].items()}
        return {**copied, **{name: like(param, value) for name, value in made.items()}}

    def _write(self, states: Mapping[Tensor, State]) -> None:
        """Stores whole states. An empty dict drops those of its parameter."""
        full = {p: state for p, state in states.items() if state}
        self._place(list(full))
        for param in states:
            self._given.pop(param, None)
            if param not in full:
                self._numbers.pop(param, None)
        values = {p: self._checked(p, state) for p, state in full.items()}
        pages: dict[int, list[Part]] = {}
        for param in full:
            for number, part in self._parts_of(param):
                pages.setdefault(number, []).append(part)
        for number, parts in pages.items():
            others = any(
                self._params[p.param] in self._numbers and self._params[p.param] not in full
                for p in self._pager.page(number).parts
            )
            memory = self._pager.open(number, load=others)
            for part in parts:
                for name, value in values[self._params[part.param]].items():
                    part.state(memory, name).copy_(value[part.start : part.start + part.numel])
            self._pager.close(number, written=True)
        for param, state in full.items():
            names = self._layout_of(param).dtypes
            self._numbers[param] = {
                n: v.detach().clone() if isinstance(v, Tensor) else v
                for n, v in state.items()
                if n not in names
            }
            if self._is_initial(state):
                self._given[param] = frozenset(state)

    def _checked(self, param: Tensor, state: State) -> dict[str, Tensor]:
        """Returns the element-wise states as 1-D tensors in the memory order of the parameter."""
        own = local(param)
        values: dict[str, Tensor] = {}
        dtypes = self._layout_of(param).dtypes
        for name in state if self._is_initial(state) else dtypes:
            value = state.get(name)
            if not isinstance(value, Tensor) or local(value).shape != own.shape:
                what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(
                    f"state {name!r} of a parameter of shape {tuple(own.shape)} is {what}: "
                    f"{type(self._optimizer).__name__} needs a tensor of the parameter's shape"
                )
            values[name] = flat_as(local(value), own)
        return values

    def _is_initial(self, state: State) -> bool:
        """Whether these are all states of a parameter that was not stepped yet."""
        initial: tuple[str, ...] = getattr(self._optimizer, "initial_states", ())
        return bool(state) and state.keys() <= set(initial)

    def _held_dtypes(self, param: Tensor) -> dict[str, torch.dtype]:
        given, dtypes = self._given.get(param), self._layout_of(param).dtypes
        return {name: dtype for name, dtype in dtypes.items() if given is None or name in given}

    def _store_new(self) -> None:
        """Stores the states that were put into dicts of parameters without states."""
        filled = {p: state for p, state in self._new.items() if state}
        self._new.clear()
        if filled:
            self._write(filled)

    # --- places

    def _parts_of(self, param: Tensor) -> Iterator[tuple[int, Part]]:
        index = self._index[param]
        for number in self._pages[index]:
            for part in self._pager.page(number).parts:
                if part.param == index:
                    yield number, part

    def _place(self, params: Sequence[Tensor]) -> None:
        """Gives places in new pages to the parameters that have none."""
        added = [p for p in params if p not in self._index]
        if not added:
            return
        by_tier: dict[Tier | None, list[Tensor]] = {}
        for param in added:
            by_tier.setdefault(self._pager.tier_of(param), []).append(param)
        for tier, params in by_tier.items():
            self._add_pages(params, tier)

    def _add_pages(self, added: Sequence[Tensor], tier: Tier | None) -> None:
        first = len(self._params)
        sizes = [
            Sized(first + i, local(p).numel(), self._layout_of(p).dtypes, self._is_whole(p))
            for i, p in enumerate(added)
        ]
        pages = divide(sizes, self._page_bytes)
        numbers = self._pager.add(pages, local(added[0]).device, tier)
        self._params += added
        self._index.update({p: first + i for i, p in enumerate(added)})
        self._pages += [[] for _ in added]
        for number, page in zip(numbers, pages, strict=True):
            for part in page.parts:
                self._pages[part.param].append(number)

    def _layout_of(self, param: Tensor) -> StateLayout:
        number = self._group_of(param)
        key = (number, param.dtype, param.device, param.ndim > 1)
        layout = self._layouts.get(key)
        if layout is None:
            determine = probe_whole if self._is_whole(param) else probe
            layout = self._layouts[key] = determine(self._optimizer, self._groups()[number], local(param))
        return layout

    def _is_whole(self, param: Tensor) -> bool:
        return needs_whole(self._optimizer, self._groups()[self._group_of(param)])

    def _group_of(self, param: Tensor) -> int:
        """Returns the index of the parameter's group."""
        number = self._group_numbers.get(param)
        if number is None:
            self._group_numbers = {
                p: index for index, group in enumerate(self._groups()) for p in group["params"]
            }
            number = self._group_numbers.get(param)
        if number is None:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is in no parameter group of this optimizer"
            )
        return number
