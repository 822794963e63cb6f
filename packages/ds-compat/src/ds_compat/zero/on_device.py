"""Construction in a dtype and on a device."""

from __future__ import annotations

import contextlib

import torch


class OnDevice:
    """Context manager in which modules are constructed with a dtype and on a device; on "meta", parameters have no
    memory.
    """

    def __init__(self, dtype: torch.dtype, device: str = "meta", enabled: bool = True) -> None:
        self.dtype, self.device, self.enabled = dtype, device, enabled
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> OnDevice:
        if self.enabled:
            before = torch.get_default_dtype()
            self._stack.enter_context(torch.device(self.device))
            torch.set_default_dtype(self.dtype)
            self._stack.callback(torch.set_default_dtype, before)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
