"""What runs in the process of a rank: receives a job, runs the test's body, reports."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import importlib
import importlib.machinery
import importlib.util
import os
import random
import signal
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from _pytest.assertion import install_importhook, pytest_assertrepr_compare, util
from _pytest.assertion.rewrite import AssertionRewritingHook
from _pytest.config import get_config

from harness.jobs import Body, Finish, FreshMonkeyPatch, Job, Kind, Report, WarningFilter, unpack_payload

_THREADS_END_S = 1.0  # for threads of the body that are just ending


class LeftBehindError(RuntimeError):
    """The body returned, and something that it started lives on."""


def serve(connection_fd: int, log_fd: int, stacks_fd: int) -> None:
    """The life of a rank: one job after the other until the connection closes."""
    _redirect(log_fd, stacks_fd)
    modules: dict[str, types.ModuleType] = {}
    with Connection(connection_fd) as connection, contextlib.suppress(EOFError):
        while True:
            job = connection.recv()
            assert isinstance(job, Job), f"expected a job, got {job!r}"
            connection.send(_run(job, modules))
            _flush()
            finish = connection.recv()  # not sent if a rank failed: then this process is killed here
            assert isinstance(finish, Finish), f"expected the end of the test, got {finish!r}"
            connection.send(_take_down(finish))
            _flush()


def _redirect(log_fd: int, stacks_fd: int) -> None:
    """Output of Python and of native code goes to the log; stacks to a file of their own, on SIGUSR1."""
    null = os.open(os.devnull, os.O_RDONLY)
    append = os.open(
        f"/proc/self/fd/{log_fd}", os.O_WRONLY | os.O_APPEND
    )  # the pool truncates the file between tests
    os.dup2(null, 0)
    os.dup2(append, 1)
    os.dup2(append, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=stacks_fd, all_threads=True)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def show_values_in_asserts() -> None:
    """pytest's rewriting of `assert`, which its own session would switch on."""
    config = get_config()
    install_importhook(config)

    def explain(op: str, left: object, right: object) -> str | None:
        lines = pytest_assertrepr_compare(config=config, op=op, left=left, right=right)
        return "\n~".join(line.replace("\n", "\\n") for line in lines) if lines else None

    util._reprcompare = explain


# --- the body ---


def _run(job: Job, modules: dict[str, types.ModuleType]) -> Report:
    """Runs the body and turns whatever happens into a report."""
    try:
        _set_process_state(job)
        body = _find(job.body, modules)
        arguments, filters = unpack_payload(job.payload)
        with _warning_filters(filters):
            _run_body(job, body, arguments)
    except pytest.skip.Exception as skip:
        return _report(Kind.SKIPPED, str(skip.msg))
    except pytest.xfail.Exception as xfail:
        return _report(Kind.XFAILED, str(xfail.msg))
    except BaseException as error:  # SystemExit is a failure of the test too
        text = "".join(traceback.format_exception(type(error), error, _own_frames(error, job.body.file)))
        return _report(Kind.FAILED, _first_line(error), text)
    return _report(Kind.PASSED)


def _report(kind: Kind, headline: str = "", text: str = "") -> Report:
    return Report(kind, headline, text, time.monotonic(), dist.is_initialized())


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _run_body(job: Job, body: Callable[..., None], arguments: dict[str, Any]) -> None:
    limit = datetime.timedelta(seconds=job.timeout_s)
    store = dist.FileStore(job.store_file, job.world_size)  # type: ignore[attr-defined]  # not in its __all__
    threads = set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        for name, value in arguments.items():
            if isinstance(value, FreshMonkeyPatch):
                arguments[name] = stack.enter_context(pytest.MonkeyPatch.context())
        unraisable = stack.enter_context(_unraisable())
        dist.init_process_group("gloo", store=store, rank=job.rank, world_size=job.world_size, timeout=limit)
        dist.barrier()  # a body that takes the group down at once must not meet a rank that still connects
        body(**arguments)
        gc.collect(0)  # so that resources dropped without being closed are charged to this test
        for text in unraisable:
            warnings.warn(pytest.PytestUnraisableExceptionWarning(text), stacklevel=1)
    _check_leaks(threads, job.groups_may_stay)


_MAY_STAY = frozenset(
    [
        "ds_zero.comm.watchdog",  # ends with the model that it watches, at the latest with the process group
        "tqdm_monitor",  # of torch.compile, for the life of the process
    ]
)


def _check_leaks(threads_before: set[threading.Thread], groups_may_stay: bool) -> None:
    left: list[str] = []
    deadline = time.monotonic() + _THREADS_END_S
    for thread in set(threading.enumerate()) - threads_before:
        if thread.name in _MAY_STAY:
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            left.append(f"thread {thread.name!r} (stop and join it)")
    if dist.is_initialized() and not groups_may_stay:
        for group in dist.distributed_c10d._world.pg_map:
            if group is not dist.group.WORLD:
                members = dist.get_process_group_ranks(group)
                left.append(
                    f"process group {group.group_name!r} of ranks {members} (destroy_process_group(group), "
                    f"or @ranks(..., groups_may_stay=True) where it belongs to a DeviceMesh)"
                )
    if left:
        raise LeftBehindError(f"the test left behind: {', '.join(left)}")


def _take_down(finish: Finish) -> Report:
    try:
        if finish.barrier_s is not None:
            work = dist.barrier(async_op=True)
            assert work is not None
            work.wait(timeout=datetime.timedelta(seconds=finish.barrier_s))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        return _report(
            Kind.FAILED,
            f"the ranks did not meet at the barrier after the test's body: did each issue the same "
            f"collectives, and wait for all of them? ({_first_line(error)})",
        )
    return _report(Kind.PASSED)


# --- the state a body starts with ---


def _set_process_state(job: Job) -> None:
    """Everything process-wide that a test before this one may have changed."""
    os.environ.clear()
    os.environ.update(job.environ)
    os.chdir(job.cwd)
    sys.path[:] = job.sys_path
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if (
        torch.are_deterministic_algorithms_enabled()
    ):  # the setter imports torch._inductor: over a second, once
        torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


@contextlib.contextmanager
def _warning_filters(filters: list[WarningFilter]) -> Iterator[None]:
    """The filters in force around the test in the process of pytest: from configuration and marks."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.filters.extend(filters)  # type: ignore[attr-defined]
        yield


@contextlib.contextmanager
def _unraisable() -> Iterator[list[str]]:
    """Collects exceptions that Python can only print: in `__del__`, and in threads."""
    seen: list[str] = []

    def in_object(args: sys.UnraisableHookArgs) -> None:
        text = "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
        seen.append(f"{args.err_msg or 'exception ignored in'} {args.object!r}\n{text}")

    def in_thread(args: threading.ExceptHookArgs) -> None:
        text = "".join(traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback))
        seen.append(f"exception in thread {args.thread.name if args.thread else '?'}\n{text}")

    hooks = sys.unraisablehook, threading.excepthook
    sys.unraisablehook, threading.excepthook = in_object, in_thread
    try:
        yield seen
    finally:
        sys.unraisablehook, threading.excepthook = hooks


# --- finding the body ---


def _find(where: Body, modules: dict[str, types.ModuleType]) -> Callable[..., None]:
    """The undecorated function, bound to a new instance if it is a method."""
    module = modules.get(where.file)
    if module is None:
        module = modules[where.file] = _load(where.module, Path(where.file))
    target: Any = module
    owner: Any = None
    for part in where.qualname.split("."):
        owner, target = target, getattr(target, part)
    while target.__qualname__ == where.qualname and hasattr(target, "__wrapped__"):
        target = target.__wrapped__
    body: Callable[..., None] = target.__get__(owner()) if isinstance(owner, type) else target
    return body


def _load(name: str, file: Path) -> types.ModuleType:
    """Imports a test module from its file under the name that pytest gave it, in any import mode."""
    package = name.rpartition(".")[0]
    if package:
        with contextlib.suppress(
            ModuleNotFoundError
        ):  # in importlib mode the package of the name need not exist
            importlib.import_module(package)
    for finder in sys.meta_path:
        if isinstance(finder, AssertionRewritingHook):
            finder.mark_rewrite(name)  # whatever the file is called
        spec = finder.find_spec(name, [str(file.parent)], None)
        if spec is not None and spec.origin == str(file):
            break
    else:
        raise ImportError(f"{file} cannot be imported as {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up there
    try:
        assert spec.loader is not None
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _own_frames(error: BaseException, file: str) -> types.TracebackType | None:
    """The traceback from the test's own first frame on; all of it if the failure was elsewhere."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename != file:
        frame = frame.tb_next
    return frame or error.__traceback__
