"""From a file, a text or a dict to a checked `DsConfig`."""

from ds_engine.config.load.loader import load

__all__ = ["load"]
