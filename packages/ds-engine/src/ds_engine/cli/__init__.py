"""The command `ds`: one module for each subcommand."""

from ds_engine.cli.main import main

__all__ = ["main"]
