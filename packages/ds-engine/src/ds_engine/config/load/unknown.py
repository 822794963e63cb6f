"""Error messages for keys that are not in the schema."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from ds_engine.config.load.legacy import RENAMES
from ds_engine.config.sections.schema import ANY, by_path, join, keys_of, sections
from ds_engine.config.support.suggest import closest

MANY = 15
"""Number of keys above which an error does not list all keys of the section."""

PARAMS = {
    "optimizer.params": ("lr", "betas", "eps", "weight_decay", "momentum", "adam_w_mode", "torch_adam"),
    "scheduler.params": (
        "warmup_num_steps",
        "warmup_min_lr",
        "warmup_max_lr",
        "warmup_type",
        "warmup_min_ratio",
        "cos_min_ratio",
        "total_num_steps",
        "cycle_min_lr",
        "cycle_max_lr",
    ),
}
"""Arguments of optimizers and schedules, which are not keys of the schema -> section to which they belong."""


def is_misspelt(name: str) -> bool:
    """Whether a key of the top level is probably a misspelt key of DeepSpeed: at most a quarter of its letters
    differ, or it is a prefix with at least two thirds of the letters. "train_batchsize" and "gradient_clip" are;
    "comment" (next to "comet"), "comms_config" and "steps" are not.
    """
    here = _here("")
    near = closest(name, here)
    if near is not None and near[1] <= max(1, len(name) // 4):
        return True
    return any(key.startswith(name.lower()) and 3 * len(name) >= 2 * len(key) for key in here)


def unknown(path: str, name: str) -> str:
    """Returns the error message: the section to which the key belongs, or the nearest key of this or another section.

    Args:
        path: path of the section; "" is the top level.
    """
    full = join(path, name)
    if name in by_path() and "." in name:
        section, _, key = name.rpartition(".")
        return f'unknown key "{full}": keys are nested; write "{key}" inside of the section "{section}"'
    here = _here(path)
    near = closest(name, here)
    homes = _elsewhere(path)
    # "stages" in zero_optimization is a misspelt "stage", not a key of the section pipeline.
    if name in homes and (near is None or near[1] > 1):
        return f'unknown key "{full}": "{name}" belongs {_place(homes[name])}'
    far = closest(name, homes) if near is None or near[1] > 1 else None
    if near is not None and (far is None or near[1] <= far[1]):
        return f'unknown key "{full}": did you mean "{here[near[0]]}"?'
    kin = _kin(name, here)
    if kin is not None and (far is None or far[1] > 1):
        return f'unknown key "{full}": did you mean "{here[kin]}"?'
    if far is not None:
        return f'unknown key "{full}": did you mean "{far[0]}", which belongs {_place(homes[far[0]])}?'
    section = "this section" if path else "the top level"
    if len(here) > MANY:
        return (
            f'unknown key "{full}": no similar key is among the {len(here)} keys of {section}, which '
            "`ds config schema --markdown` lists"
        )
    return f'unknown key "{full}": {section} has {", ".join(sorted(keys_of(sections()[path], path)))}'


@cache
def _here(path: str) -> dict[str, str]:
    """Returns current and old names of the keys of a section -> current path."""
    paths = {name: key.path for name, key in keys_of(sections()[path], path).items()}
    for rule in RENAMES:
        section, _, name = rule.old.rpartition(".")
        if section == path:
            paths.setdefault(name, rule.new)
    return paths


def _kin(name: str, candidates: Iterable[str]) -> str | None:
    """Returns the candidate that shares a prefix of at least half of `name`: "output_dir" for "output_path"."""
    lengths = {
        c: next(
            (i for i, (a, b) in enumerate(zip(name.lower(), c, strict=False)) if a != b),
            min(len(name), len(c)),
        )
        for c in candidates
    }
    best = max(lengths, key=lambda c: (lengths[c], -len(c)), default=None)
    return best if best is not None and lengths[best] >= max(3, len(name) / 2) else None


_OWN = frozenset({"activation_offload", "offload"})
"""Sections that DeepSpeed does not have, with keys of the same names as sections that it has."""


@cache
def _elsewhere(path: str) -> dict[str, str]:
    """Returns key -> the most likely section among all other sections: the outermost and most common one."""
    ranked = sorted(
        sections(),
        key=lambda section: (
            section in _OWN,
            section.count("."),
            section != "zero_optimization",
            ANY in section,
        ),
    )
    homes: dict[str, str] = {}
    for section in ranked:
        if section != path:
            for name in keys_of(sections()[section], section):
                homes.setdefault(name, section)
    for section, names in PARAMS.items():
        for name in names:
            homes.setdefault(name, section)
    return homes


def _place(section: str) -> str:
    return f'under "{section}"' if section else "at the top level"
