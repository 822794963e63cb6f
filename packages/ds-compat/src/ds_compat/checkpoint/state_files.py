"""Files of DeepSpeed's checkpoints, for converters that read these files, such as Lightning's.

Our checkpoints have no such files. The stage and the client state, which converters need, are written to temporary
files that are deleted when the process ends.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ds_checkpoint import Checkpoint
from ds_checkpoint.format import codec, manifest


def get_checkpoint_files(checkpoint_dir: str | os.PathLike[str], glob_pattern: str) -> list[str]:
    """Files of one checkpoint that match, in the order of their numbers.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(Path(checkpoint_dir).glob(glob_pattern), key=lambda f: _numbers(f.name))
    if not files:
        raise FileNotFoundError(f"no file {glob_pattern!r} in {checkpoint_dir}")
    return [str(file) for file in files]


def get_optim_files(checkpoint_dir: str | os.PathLike[str]) -> list[str]:
    """Files with the states of the optimizer, of one checkpoint (the folder of a tag).

    Raises:
        FileNotFoundError: there are none, and it is no checkpoint of ours either.
    """
    if not _is_ours(checkpoint_dir):
        return get_checkpoint_files(checkpoint_dir, "*_optim_states.pt")
    with Checkpoint(checkpoint_dir) as checkpoint:
        section = checkpoint.manifest.values.get("config", {}).get("zero_optimization", {})
        stage = section.get("stage", 0) if isinstance(section, dict) else 0
    content = {"optimizer_state_dict": {"zero_stage": stage, "partition_count": 1}}
    return [_written(checkpoint_dir, "zero_pp_rank_0_mp_rank_00_optim_states.pt", content)]


def get_model_state_file(checkpoint_dir: str | os.PathLike[str], zero_stage: int) -> str:
    """The file with the module's states and the client state.

    Raises:
        FileNotFoundError: it is missing, and it is no checkpoint of ours either.
        ValueError: `zero_stage` is none.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage is {zero_stage}: it must be 0, 1, 2 or 3")
    if not _is_ours(checkpoint_dir):
        name = (
            "zero_pp_rank_0_mp_rank_00_model_states.pt" if zero_stage == 3 else "mp_rank_00_model_states.pt"
        )
        return get_checkpoint_files(checkpoint_dir, name)[0]
    with Checkpoint(checkpoint_dir) as checkpoint:
        values = checkpoint.manifest.values
        client = codec.decode(values.get("client_state", {}), checkpoint.blob)
        counters = dict(values.get("counters", {}))
    return _written(checkpoint_dir, "mp_rank_00_model_states.pt", {"module": {}, **counters, **client})


def get_model_state_files(checkpoint_dir: str | os.PathLike[str]) -> list[str]:
    """As `get_model_state_file`, in a list."""
    if _is_ours(checkpoint_dir):
        return [get_model_state_file(checkpoint_dir, 0)]
    return get_checkpoint_files(checkpoint_dir, "*_model_states.pt")


def _is_ours(checkpoint_dir: str | os.PathLike[str]) -> bool:
    return (Path(checkpoint_dir) / manifest.NAME).is_file()


def _numbers(name: str) -> list[Any]:
    """A key by which "rank_10" comes after "rank_9"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@functools.lru_cache(1)
def _folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="ds-compat-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def _written(checkpoint_dir: str | os.PathLike[str], name: str, content: dict[str, Any]) -> str:
    target = Path(tempfile.mkdtemp(prefix=f"{Path(checkpoint_dir).name}-", dir=_folder())) / name
    torch.save(content, target)
    return str(target)
