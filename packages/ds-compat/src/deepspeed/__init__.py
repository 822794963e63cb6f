"""The names of DeepSpeed 0.19.8 on top of the ds packages; this is not DeepSpeed. See ds_compat.

Nothing is computed here: `ds_compat.names` says where each name lives, and it is looked up on first use.
"""

from ds_compat.modules import install as _install

__version__, __getattr__, __dir__ = _install(__name__, __path__)
