"""Sizes with units, in the options of commands."""

from ds_engine.config.support.sizes import parse_bytes

__all__ = ["parse_bytes"]
