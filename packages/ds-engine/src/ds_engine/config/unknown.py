"""What to say about a key that is not in the schema."""

from __future__ import annotations

from functools import cache

from ds_engine.config.schema import ANY, join, keys_of, sections
from ds_engine.config.suggest import closest


def unknown(path: str, name: str) -> str:
    """The nearest key of this section, else of another one; a key that exists elsewhere is told where it belongs.

    Args:
        path: of the section; "" is the top level.
    """
    full = join(path, name)
    here = list(keys_of(sections()[path], path))
    near = closest(name, here)
    homes = _elsewhere(path)
    # "stages" in zero_optimization is a slip of the finger, not a wish for a pipeline.
    if name in homes and (near is None or near[1] > 1):
        return f'unknown key "{full}": "{name}" belongs {_place(homes[name])}'
    far = closest(name, homes) if near is None or near[1] > 1 else None
    if near is not None and (far is None or near[1] <= far[1]):
        return f'unknown key "{full}": did you mean "{join(path, near[0])}"?'
    if far is not None:
        return f'unknown key "{full}": did you mean "{far[0]}", which belongs {_place(homes[far[0]])}?'
    return (
        f'unknown key "{full}": {"this section" if path else "the top level"} has {", ".join(sorted(here))}'
    )


@cache
def _elsewhere(path: str) -> dict[str, str]:
    """Key -> the section that it is most likely meant for, of all sections but this one: the outermost, and that of
    what is most used first.
    """
    ranked = sorted(
        sections(), key=lambda section: (section.count("."), section != "zero_optimization", ANY in section)
    )
    found: dict[str, str] = {}
    for section in ranked:
        if section != path:
            for name in keys_of(sections()[section], section):
                found.setdefault(name, section)
    return found


def _place(section: str) -> str:
    return f'under "{section}"' if section else "at the top level"
