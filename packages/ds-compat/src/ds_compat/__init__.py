"""Existing DeepSpeed code on the ds packages: provides the import name `deepspeed`.

User code only imports `deepspeed`, never this package.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
