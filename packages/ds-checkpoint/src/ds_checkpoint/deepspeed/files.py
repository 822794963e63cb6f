"""The files of a DeepSpeed checkpoint, and the role of each."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ds_checkpoint.errors import CheckpointError

MAX_NAME_BYTES = 4096
"""Maximum length of a path, in bytes."""

_MODEL = re.compile(r"^(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$")
_OPTIM = re.compile(r"^(?:bf16_|fp16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt$")


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint, ordered by data-parallel rank."""

    path: Path
    model: tuple[Path, ...]
    """One file for all ranks (stages 0 to 2), or one for each rank (stage 3)."""
    optim: tuple[Path, ...]
    """One file for each rank; none at stage 0."""

    @property
    def universal(self) -> bool:
        """Whether it is in DeepSpeed's universal format: one folder for each parameter."""
        return (self.path / "zero").is_dir()


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is the folder of one checkpoint of DeepSpeed's."""
    # Unlike Path.is_dir, os.path.isdir returns False for a name that is too long or contains a zero byte.
    return os.path.isdir(path) and any(_MODEL.match(child.name) for child in path.iterdir())


def locate(root: Path, tag: str | None) -> Path | None:
    """Returns the folder of the DeepSpeed checkpoint `tag`, or of the one in `latest`; None if there is none."""
    if tag is None:
        latest = next((root / n for n in ("latest", "latest_universal") if (root / n).is_file()), None)
        if latest is None:
            return root if is_checkpoint(root) else None
        # `latest` may contain any bytes: a name without a folder is reported as not found.
        tag = latest.read_bytes()[:MAX_NAME_BYTES].decode(errors="replace").strip()
    return root / tag if is_checkpoint(root / tag) else None


def find(path: Path) -> Files:
    """Returns the checkpoint files in `path`.

    Raises:
        CheckpointError: files of some ranks are missing, or the checkpoint was written with model or pipeline
            parallelism.
    """
    model: dict[int, Path] = {}
    optim: dict[int, Path] = {}
    if any(child.name.startswith("layer_") for child in path.iterdir()):
        raise CheckpointError(
            f"{path} was written by a pipeline or contains expert layers: load the weights of a pipeline with "
            "ds_checkpoint.load_layers(module, path), before the module is sharded"
        )
    for child in sorted(path.iterdir()):
        for pattern, by_rank in ((_MODEL, model), (_OPTIM, optim)):
            match = pattern.match(child.name)
            if match is None:
                continue
            if int(match["mp"]) != 0:
                raise CheckpointError(
                    f"{path} was written by {int(match['mp']) + 1} or more model-parallel ranks ({child.name}): "
                    "only the model's code knows how to join their parameters; convert it with the tool of the "
                    "model that wrote it"
                )
            by_rank[int(match["dp"] or 0)] = child
    for kind, by_rank in (("model", model), ("optimizer", optim)):
        gone = sorted(set(range(max(by_rank, default=-1) + 1)) - by_rank.keys())
        if gone:
            raise CheckpointError(
                f"{path} has no {kind} states of rank {gone[0]}: the checkpoint was not copied completely"
            )
    return Files(path, tuple(model[r] for r in sorted(model)), tuple(optim[r] for r in sorted(optim)))
