"""`deepspeed.utils.logger`, `log_dist` and their relatives."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

log_levels: Mapping[str, int] = {
    name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")
}


class _Logger(logging.Logger):
    def warning_once(self, message: str, *args: Any) -> None:
        """A warning, the first time that this text is given."""
        _once(self.name, message, args)


@functools.lru_cache(None)
def _once(name: str, message: str, args: tuple[Any, ...]) -> None:
    logging.getLogger(name).warning(message, *args)


class _Stdout(logging.StreamHandler[Any]):
    """Writes to whatever sys.stdout is at that moment, so that redirecting it works."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stdout


def _make(name: str) -> _Logger:
    made = _Logger(name, logging.WARNING)
    handler = _Stdout()
    handler.setFormatter(
        logging.Formatter("[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d:%(funcName)s] %(message)s")
    )
    made.addHandler(handler)
    made.propagate = False
    logging.Logger.manager.loggerDict[name] = made
    return made


logger = _make("DeepSpeed")


class LoggerFactory:
    """Loggers in the same format."""

    @staticmethod
    def create_logger(name: str | None = None, level: int = logging.WARNING) -> logging.Logger:
        if name is None:
            raise ValueError("a logger needs a name")
        made = _make(name)
        made.setLevel(level)
        return made


def _for_this_rank(message: str, ranks: Sequence[int] | None) -> str | None:
    """The message with the rank before it, or None if this rank is not meant; -1 means all."""
    if not dist.is_initialized():
        return f"[Rank -1] {message}"
    rank = dist.get_rank()
    return f"[Rank {rank}] {message}" if ranks and (ranks[0] == -1 or rank in ranks) else None


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log on the given ranks; [-1] means all, and before a process group stands every process logs."""
    text = _for_this_rank(message, ranks)
    if text is not None:
        logger.log(level, text)


def print_dist(message: str, ranks: Sequence[int] | None = None) -> None:
    """As `log_dist`, whatever the level."""
    text = _for_this_rank(message, ranks)
    if text is not None:
        sys.stdout.write(text + "\n")


@functools.lru_cache(None)
def _dist_once(message: str, ranks: tuple[int, ...] | None, level: int) -> None:
    log_dist(message, ranks, level)


def log_dist_once(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """As `log_dist`, once for each text."""
    _dist_once(message, None if ranks is None else tuple(ranks), level)


def warning_once(message: str, *args: Any) -> None:
    """A warning, the first time that this text is given."""
    logger.warning_once(message, *args)


def get_log_level_from_string(log_level_str: str) -> int:
    """ValueError if there is no level of that name."""
    try:
        return log_levels[log_level_str.lower()]
    except KeyError:
        raise ValueError(f"{log_level_str} is not a valid level: one of {', '.join(log_levels)}") from None


def set_log_level_from_string(log_level_str: str, custom_logger: logging.Logger | None = None) -> None:
    """Set the level of DeepSpeed's logger, or of another one."""
    level = get_log_level_from_string(log_level_str)
    target = custom_logger or logger
    target.setLevel(level)
    for handler in target.handlers:
        handler.setLevel(level)


def get_current_level() -> int:
    """The logger's effective level."""
    return logger.getEffectiveLevel()


def should_log_le(max_log_level_str: str) -> bool:
    """Whether the logger's level is at most the named one."""
    return get_current_level() <= get_log_level_from_string(max_log_level_str)


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log what this process and its accelerator hold; nothing unless `force`."""
    if not force or (dist.is_initialized() and dist.get_rank() != 0):
        return
    from ds_compat.device import get_accelerator

    here = get_accelerator()
    logger.info(
        f"{message}: allocated {here.memory_allocated() / 2**30:.2f} GiB, "
        f"peak {here.max_memory_allocated() / 2**30:.2f} GiB, free {here.available_memory() / 2**30:.2f} GiB"
    )
