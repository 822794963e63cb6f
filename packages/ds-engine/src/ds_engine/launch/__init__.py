"""Starts the ranks of a job. Nothing here imports torch, so `ds` starts fast.

`plan.py` decides what to start on a machine (pure), `supervise.py` starts it and watches. It sees the ranks as a crew
(`crew.py`): processes of this machine (`rank.py`), or those of several machines (`remote/`). `console.py` and
`output.py` pass their output on, `failure.py` determines which rank failed first and suggests a remedy (pure),
`devices.py`, `machine.py` and `network.py` inspect the machine. `interactive/` starts ranks that call a
function, `emit/` writes jobs for schedulers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_engine.launch.interactive.notebook import RankFailedError, notebook

__all__ = ["RankFailedError", "notebook"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ds_engine.launch.interactive import notebook as home

        return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
