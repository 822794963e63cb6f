"""The error for an invalid configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def _rebuilt(cls: type[ConfigError], args: tuple[object, ...], attributes: dict[str, object]) -> ConfigError:
    """Restores a pickled error of any subclass."""
    error = cls.__new__(cls, *args)
    error.args = args
    vars(error).update(attributes)
    return error


class ConfigError(ValueError):
    """One or more mistakes in a configuration. `problems` contains one sentence for each, with the path of the key
    and a remedy.
    """

    def __init__(self, problems: Sequence[str], where: str = "the configuration") -> None:
        self.problems = tuple(problems)
        if len(problems) == 1:
            text = f"{where}: {problems[0]}"
        else:
            numbered = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
            text = f"{where} has {len(problems)} mistakes:\n{numbered}"
        super().__init__(text)

    def __reduce__(self) -> tuple[Any, ...]:
        # The constructor takes problems, while `args` holds the text made from them: pickling must not call it again.
        return _rebuilt, (type(self), self.args, vars(self).copy())
