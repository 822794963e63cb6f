"""Reads files of `torch.save` without executing any code in them.

A pickle names classes and functions, and an ordinary reader imports and calls them. Here the pickle is read into
plain containers and `Stand` objects, which only record how an object would be constructed. After the whole pickle has
been read, the `Stand` objects for tensors and common containers are converted to these, and every number is checked
against the file. The pickle never gets access to an object of torch. So a file of unknown origin can be read, and the
contents of unknown classes can be inspected.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from ds_checkpoint.deepspeed.archive import Archive
from ds_checkpoint.deepspeed.rebuild import Rebuilder
from ds_checkpoint.deepspeed.stand import Stand
from ds_checkpoint.errors import CheckpointError

__all__ = ["Stand", "read"]


# Python's own implementation instead of the one in C: its opcodes can be overridden, and its memo is a dict, while
# the C version allocates memory up to the largest index that a file claims.
class _Unpickler(pickle._Unpickler):
    """Creates or fills a `Stand` for every opcode that would import, call or fill something."""

    # Attributes of the base class that its stubs lack.
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._num_bytes = len(content)

    def find_class(self, module: str, name: str) -> Stand:
        return Stand(f"{module}.{name}")

    def get_extension(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError(f"extension code {code}: files of torch have none")

    def persistent_load(self, pid: Any) -> Stand:
        made = Stand("storage")
        made.args = pid if isinstance(pid, tuple) else (pid,)
        return made

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], args)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        keywords = self.stack.pop()
        args = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], args, keywords)

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(_called(klass, tuple(args)))

    def load_build(self) -> None:
        state = self.stack.pop()
        _stand(self.stack[-1]).fill(state)

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def load_appends(self) -> None:
        values = self.pop_mark()
        self._extend(self.stack[-1], values)

    def _extend(self, target: Any, values: list[Any]) -> None:
        if type(target) is list:
            target.extend(values)
        else:
            _stand(target).items.extend(values)

    def load_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(self.stack[-1], items)

    def _set_items(self, target: Any, items: list[Any]) -> None:
        pairs = zip(items[::2], items[1::2], strict=True)
        if type(target) is dict:
            target.update(pairs)
        else:
            _stand(target).pairs.extend(pairs)

    def load_additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is set:
            target.update(items)
        else:
            _stand(target).items.extend(items)

    def load_bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        if size > self._num_bytes:
            raise pickle.UnpicklingError(f"a bytearray of {size} bytes in a file of {self._num_bytes}")
        self.append(bytearray(self.read(size)))

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def _stand(value: Any) -> Stand:
    if not isinstance(value, Stand):
        raise pickle.UnpicklingError(f"a {type(value).__name__} is filled like an object")
    return value


def _called(function: Any, args: Any, keywords: Any = None) -> Stand:
    """Returns the `Stand` for the result of a call."""
    made = Stand(_stand(function).cls)
    if not isinstance(args, tuple) or not isinstance(keywords, (dict, type(None))):
        raise pickle.UnpicklingError("arguments of a call are no tuple")
    made.args, made.called = args, True
    made.state.update(keywords or {})
    return made


def read(path: Path) -> Any:
    """Returns the content of a file that `torch.save` wrote. Tensors are memory-mapped, so only the accessed parts
    are read.

    Raises:
        CheckpointError: the file is truncated, damaged, a TorchScript archive, in the format before torch 1.6, or
            another kind of file.
        OSError: the system cannot open it.
    """
    try:
        archive = Archive(path)
        return Rebuilder(archive).rebuild(_Unpickler(archive.pickle()).load())
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # a damaged pickle can fail at any step, in any way
        why = str(error).splitlines()[0] if str(error) else "no reason given"
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {why}): it is damaged, incomplete, or was not "
            "written by torch.save"
        ) from error
