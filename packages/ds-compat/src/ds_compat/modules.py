"""Makes the modules below `deepspeed` from the table in `names.py`.

Each is an ordinary module object in sys.modules whose names are looked up on first use, so that `import deepspeed`
costs a dictionary, `from deepspeed.runtime.zero.config import X` works, and a name can be replaced from outside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from ds_compat.names import MODULES, VERSION

_FOREIGN_FILES = ("git_version_info_installed.py", "runtime/engine.py")
"""Files in DeepSpeed's folder that ours never contains."""


def install(package: str, path: Iterable[str]) -> tuple[str, Callable[[str], Any], Callable[[], list[str]]]:
    """Registers every module below `package` in sys.modules. Returns `__version__`, `__getattr__` and `__dir__` for
    the package itself.

    Raises:
        ImportError: DeepSpeed's files are in the same folder.
    """
    refuse_original(path)
    root = sys.modules[package]
    # Parents first: a child is an attribute of its parent.
    for name in sorted(_with_parents(MODULES), key=lambda n: n.count(".")):
        if name:
            _make(package, name)
    look_up, listing = _functions(package, MODULES[""])
    root.__dict__["__path__"] = list(path)
    return VERSION, look_up, listing


def refuse_original(path: Iterable[str]) -> None:
    """Raises ImportError if DeepSpeed's files are in one of the folders."""
    for folder in path:
        foreign = [name for name in _FOREIGN_FILES if (Path(folder) / name).is_file()]
        if foreign:
            raise ImportError(
                f"both DeepSpeed and ds-compat are installed into {folder}, so that their files are mixed. Keep one: "
                "`pip uninstall deepspeed ds-compat`, then `pip install ds-compat` (or `pip install deepspeed`)"
            )


def _with_parents(names: Iterable[str]) -> set[str]:
    paths: set[str] = set()
    for name in names:
        parts = name.split(".")
        paths |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return paths


def _make(package: str, name: str) -> None:
    full = f"{package}.{name}"
    homes = MODULES.get(name, {})
    module = ModuleType(full, f"Names of DeepSpeed's {full}; see ds_compat.names.")
    module.__spec__ = ModuleSpec(full, None, origin="ds_compat.names", is_package=True)
    folder = Path(sys.modules[package].__path__[0], *name.split("."))
    module.__path__ = [str(folder)] if folder.is_dir() else []  # files there are modules of their own
    module.__package__ = full
    look_up, listing = _functions(full, homes)
    vars(module).update(__getattr__=look_up, __dir__=listing, __file__=__file__)
    if isinstance(homes, str):  # the whole module is ours
        module = _Alias(full, homes)
    sys.modules[full] = module
    parent, _, leaf = full.rpartition(".")
    if leaf not in _names_of(
        MODULES.get(name.rpartition(".")[0], {})
    ):  # z3_leaf_module is a function and a module
        setattr(sys.modules[parent], leaf, module)


def _names_of(homes: Mapping[str, str] | str) -> set[str]:
    """The names that a module of the table has, submodules apart."""
    if isinstance(homes, str):
        return set()
    return {entry.partition("=")[0] for names in homes.values() for entry in names.split()}


class _Alias(ModuleType):
    """A module that is one of ours under another name: reads and writes go there."""

    def __init__(self, full: str, home: str) -> None:
        super().__init__(full)
        spec = ModuleSpec(full, None, origin=home, is_package=True)
        self.__dict__.update(__spec__=spec, __path__=[], __package__=full, _home=home, _before={})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        return getattr(import_module(self._home), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if f"{self.__name__}.{name}" in sys.modules:  # a submodule is being attached
            self.__dict__[name] = value
        else:
            home = import_module(self._home)
            self._before.setdefault(name, getattr(home, name, None))
            setattr(home, name, value)

    def __delattr__(self, name: str) -> None:
        """Undo a replacement, as mock.patch does with what it did not find in the module's dictionary."""
        if name in self._before:
            setattr(import_module(self._home), name, self._before.pop(name))
        else:
            super().__delattr__(name)

    def __dir__(self) -> list[str]:
        return dir(import_module(self._home))


def _functions(
    full: str, homes: Mapping[str, str] | str
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    table: dict[str, tuple[str, str]] = {}
    if not isinstance(homes, str):
        for home, names in homes.items():
            for entry in names.split():
                name, _, original = entry.partition("=")
                table[name] = (home, original or name)

    def look_up(name: str) -> Any:
        if name not in table:
            raise AttributeError(
                f"module {full!r} has no attribute {name!r}: DeepSpeed is provided by ds-compat here, which does not "
                "have it (if DeepSpeed has)"
            )
        home, original = table[name]
        value = getattr(import_module(home), original)
        vars(sys.modules[full])[name] = value
        return value

    def listing() -> list[str]:
        return sorted({*table, *(n for n in vars(sys.modules[full]) if not n.startswith("_"))})

    return look_up, listing
