"""Reads a file, a string or a dict into a checked `DsConfig`."""

from ds_engine.config.load.loader import load

__all__ = ["load"]
