"""The function that every rank calls, as files in a folder that the caller and the ranks share.

`call.pkl` has the function and its arguments; a rank writes `result_RANK.pkl` or `error_RANK.pkl`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_engine.launch.plan import LaunchError

_CALL = "call.pkl"


@dataclass(frozen=True)
class Failure:
    """An exception of a rank."""

    error: BaseException | None
    """None if it cannot be pickled."""
    traceback: str


def write_call(folder: Path, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Writes the function and its arguments.

    Raises:
        LaunchError: other processes cannot import the function, or the arguments cannot be pickled.
    """
    main_file, pickler = _main_file(function), "pickle"
    if _needs_value(function, main_file):
        pickler = "cloudpickle"
        if importlib.util.find_spec(pickler) is None:
            raise LaunchError(
                f"{function.__qualname__} is defined in this session, from which other processes cannot import it: "
                "write it to a file (%%writefile train.py) and import it from there, or pip install cloudpickle"
            )
    try:
        payload = importlib.import_module(pickler).dumps((function, tuple(arguments)))
    except Exception as error:
        raise LaunchError(f"{function!r} with its arguments cannot be sent to the ranks: {error}") from error
    path = [entry or os.getcwd() for entry in sys.path]
    with (folder / _CALL).open("wb") as file:
        pickle.dump((path, main_file, payload), file)


def _main_file(function: Callable[..., Any]) -> str | None:
    """Returns the script that defines the function; None if a module defines it, or a session without a file."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    is_main = getattr(function, "__module__", None) == "__main__"
    return os.path.abspath(file) if is_main and file is not None and Path(file).is_file() else None


def _needs_value(function: Callable[..., Any], main_file: str | None) -> bool:
    """Whether the function itself must be sent, because no process can import it by its name."""
    qualified = getattr(function, "__qualname__", "")
    return "<" in qualified or (getattr(function, "__module__", None) == "__main__" and main_file is None)


def run_call(folder: Path, rank: int) -> None:
    """Calls the function on one rank, and writes its result or its exception, which is raised again."""
    try:
        with (folder / _CALL).open("rb") as file:
            path, main_file, payload = pickle.load(file)
        sys.path[:] = path
        if main_file is not None:
            _import_main(main_file)
        function, arguments = pickle.loads(payload)
        result = pickle.dumps(function(*arguments))
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code not in (0, None):
            _write(folder / f"error_{rank}.pkl", _failure(error))
        raise
    _write(folder / f"result_{rank}.pkl", result)


def _import_main(file: str) -> None:
    """Executes a script under another name than __main__, so that only its definitions take effect."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    vars(module).update(runpy.run_path(file, run_name="__mp_main__"))


def _failure(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        data = pickle.dumps(Failure(error.with_traceback(None), text))
        pickle.loads(data)
    except Exception:  # noqa: BLE001 (an exception whose constructor takes other arguments may raise anything)
        return pickle.dumps(Failure(None, text))
    return data


def _write(path: Path, data: bytes) -> None:
    """Writes a file that appears complete, or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.rename(path)


def read_results(folder: Path, ranks: int) -> list[Any]:
    """Returns the results of all ranks.

    Raises:
        FileNotFoundError: a rank has ended without a result.
    """
    return [pickle.loads((folder / f"result_{rank}.pkl").read_bytes()) for rank in range(ranks)]


def read_failure(folder: Path, rank: int) -> Failure | None:
    """Returns the exception of a rank; None if it has written none, for example because it was killed."""
    path = folder / f"error_{rank}.pkl"
    failure: Failure | None = pickle.loads(path.read_bytes()) if path.is_file() else None
    return failure


if __name__ == "__main__":
    # Under its own name, so that what is pickled here can be unpickled by the caller.
    from ds_engine.launch.interactive.call import run_call as run

    run(Path(sys.argv[1]), int(os.environ["RANK"]))
