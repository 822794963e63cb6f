"""Existing DeepSpeed code on the ds packages: provides the import name `deepspeed`.

`import deepspeed` afterwards, as always; nothing of this package has to be named.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
