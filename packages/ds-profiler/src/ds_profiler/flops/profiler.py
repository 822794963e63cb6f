"""`FlopsProfiler` records what a model does; `profile_model` runs a model once and returns its profile."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from ds_profiler.flops.formulas import Formula, Formulas
from ds_profiler.flops.profile import ModuleProfile, Profile
from ds_profiler.flops.recorder import Recorder


class FlopsProfiler:
    """Counts parameters, operations and time of each module of a model, in forward and backward.

    Use it as a context manager around one or more forwards and backwards, in any training loop::

        with FlopsProfiler(model) as profiler:
            model(x).sum().backward()
        print(text(profiler.profile()))

    Nothing stays on the model afterwards, and a model that is not being profiled is not slowed down. While it records,
    compiled code runs uncompiled, because operations inside of it could not be seen.

    Args:
        model: any module.
        formulas: formulas for operations of your own, by name ("mylib::attention"); each takes positional arguments,
            keyword arguments and result of a call, and returns its `Work`.
        ignore: classes of modules that are not listed; what happens in them belongs to the module around them.
        synchronize: wait for the accelerator where time is taken. Default: if the model is on one. Without it times
            are those of the launches.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        formulas: Mapping[str, Formula] | None = None,
        ignore: Collection[type[nn.Module]] = (),
        synchronize: bool | None = None,
    ) -> None:
        self.model = model
        self._ignore = tuple(ignore)
        self._formulas = formulas
        if synchronize is None:
            synchronize = any(p.device.type not in ("cpu", "meta") for p in model.parameters())
        self._synchronize = synchronize
        self._stack = contextlib.ExitStack()
        self.reset()

    def reset(self) -> None:
        """Forgets what was recorded. Modules that were added to the model meanwhile are seen from now on."""
        self._stack.close()
        # A module that is used under several names is listed under the first.
        self._named = [
            (name, m) for name, m in self.model.named_modules() if not name or not isinstance(m, self._ignore)
        ]
        self._counted = Formulas(self._formulas)
        self._recorder = Recorder([m for _, m in self._named], self._counted, self._synchronize)

    def start(self) -> None:
        """Begins to record, or goes on. For a context manager, use `with`."""
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._recorder.start()
        self._stack.callback(self._recorder.stop)

    def stop(self) -> None:
        """Ends recording; what was recorded stays."""
        self._stack.close()

    def __enter__(self) -> FlopsProfiler:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def profile(self) -> Profile:
        """What was recorded until now."""
        tallies = self._recorder.tallies
        return Profile(
            model=self._tree(),
            outside_forward=tallies.outside.forward,
            outside_backward=tallies.outside.backward + tallies.outside.recomputed,
            unknown=dict(self._counted.unknown),
            forwards=tallies.modules[0].calls,
        )

    def _tree(self) -> ModuleProfile:
        below: dict[str, list[ModuleProfile]] = {}
        names = {name for name, _ in self._named}
        # named_modules lists parents before their children.
        for index in reversed(range(len(self._named))):
            name, _ = self._named[index]
            children = tuple(reversed(below.pop(name, [])))
            profile = self._of(index, children)
            if not name:
                return profile
            below.setdefault(_parent(name, names), []).append(profile)
        raise AssertionError("a model contains itself")

    def _of(self, index: int, children: Sequence[ModuleProfile]) -> ModuleProfile:
        name, module = self._named[index]
        tally = self._recorder.tallies.modules[index]
        return ModuleProfile(
            name=name,
            kind=type(module).__name__,
            details=module.extra_repr(),
            params=sum(p.numel() for p in module.parameters()),
            calls=tally.calls,
            forward=sum((c.forward for c in children), tally.forward),
            backward=sum((c.backward for c in children), tally.backward),
            recomputed=sum((c.recomputed for c in children), tally.recomputed),
            forward_s=tally.forward_ns / 1e9 if tally.calls else sum(c.forward_s for c in children),
            backward_s=tally.backward_ns / 1e9 + sum(c.backward_s for c in children),
            children=tuple(children),
        )


def _parent(name: str, names: Collection[str]) -> str:
    """The nearest listed module above `name`."""
    while name:
        name = name.rpartition(".")[0]
        if name in names:
            return name
    return ""


def profile_model(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    warm_up: int = 1,
    mode: Literal["forward", "generate"] = "forward",
    ignore: Collection[type[nn.Module]] = (),
    formulas: Mapping[str, Formula] | None = None,
) -> Profile:
    """Runs a model's forward (or its `generate`) and returns the profile.

    Args:
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        warm_up: runs before the one that is profiled. Like every run they may change the model's buffers, such as the
            running statistics of batch normalisation.
        mode: the method that is called.

    Raises:
        ValueError: `model` has no method `generate`.
    """
    run = model if mode == "forward" else getattr(model, "generate", None)
    if mode not in ("forward", "generate") or run is None:
        raise ValueError(f'mode "{mode}": {type(model).__name__} has no method of that name; use "forward"')
    for _ in range(warm_up):
        run(*args, **(kwargs or {}))
    with FlopsProfiler(model, ignore=ignore, formulas=formulas) as profiler:
        run(*args, **(kwargs or {}))
    return profiler.profile()
