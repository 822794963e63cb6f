"""`@ranks(...)`: turns a test function into one that runs on several processes."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest

from harness import verdict
from harness.jobs import Body
from harness.pool import Pool

# Fixtures that act on the process of pytest: on a rank they would silently do nothing.
_HOME_ONLY = (
    "request",
    "pytestconfig",
    "capsys",
    "capfd",
    "capsysbinary",
    "capfdbinary",
    "caplog",
    "recwarn",
)


def ranks(
    *world_sizes: int, timeout_s: float = 60.0, groups_may_stay: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs the decorated test once per world size, each time on that many gloo ranks.

    timeout_s: seconds that the whole body may take; then all stacks are shown and the processes killed.
    groups_may_stay: process groups that the body made besides the default one may be alive at its end (those
        of a `DeviceMesh` cannot be destroyed by hand); otherwise they fail the test.

    The body may take `world_size` as an argument. Raises TypeError for a body that ranks cannot run.
    """
    if not world_sizes or any(not isinstance(n, int) or n < 1 for n in world_sizes):
        raise TypeError(
            f"@ranks takes one or more world sizes, as in @ranks(2) or @ranks(1, 2, 4); got {world_sizes}"
        )

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        signature = _checked_signature(body)
        where = Body(body.__module__, inspect.getfile(body), body.__qualname__)

        @functools.wraps(body)
        def on_ranks(*bound: Any, request: pytest.FixtureRequest, world_size: int, **arguments: Any) -> None:
            if "world_size" in signature.parameters:
                arguments["world_size"] = world_size
            pool = Pool.of(request.config)
            result = pool.run(
                where, world_size, arguments, timeout_s=timeout_s, groups_may_stay=groups_may_stay
            )
            sys.stdout.write(result.output)
            verdict.announce(result)

        own = [p for name, p in signature.parameters.items() if name != "world_size"]
        extra = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in ("world_size", "request")]
        on_ranks.__signature__ = signature.replace(parameters=[*own, *extra])  # type: ignore[attr-defined]
        ids = [f"{n}rank{'s' * (n > 1)}" for n in world_sizes]
        marked: Callable[..., None] = pytest.mark.parametrize("world_size", world_sizes, ids=ids)(on_ranks)
        return marked

    return decorate


def _checked_signature(body: Callable[..., None]) -> inspect.Signature:
    name = body.__qualname__
    if "<locals>" in name:
        raise TypeError(
            f"@ranks: {name} is defined inside a function, where no other process can find it; move it out"
        )
    if inspect.iscoroutinefunction(body) or inspect.isgeneratorfunction(body):
        raise TypeError(f"@ranks: {name} is a coroutine or a generator; a rank runs ordinary functions")
    signature = inspect.signature(body)
    refused = [p for p in signature.parameters if p in _HOME_ONLY]
    if refused:
        raise TypeError(
            f"@ranks: {name} asks for {', '.join(refused)}, which acts on the process of pytest and not on "
            f"the ranks; what a rank prints is captured anyway, and inside the body you can use "
            f"contextlib.redirect_stdout, pytest.warns or logging handlers"
        )
    return signature
