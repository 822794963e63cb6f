"""The script `zero_to_fp32.py` in checkpoint directories, and names of DeepSpeed's checkpoint files."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from torch import nn

_SCRIPT = '''#!/usr/bin/env python
"""Whole fp32 weights from the checkpoints in this folder: python zero_to_fp32.py . output_folder"""

from ds_compat.zero_to_fp32 import main

main()
'''


def leave_script(folder: str | os.PathLike[str]) -> None:
    """Writes `zero_to_fp32.py` into the directory of the checkpoints, as DeepSpeed does."""
    target = Path(folder) / "zero_to_fp32.py"
    if not target.exists():
        part = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
        part.write_text(_SCRIPT, encoding="utf-8")
        part.rename(target)


def get_model_ckpt_name_for_rank(base_folder: str, mp_rank_str: str) -> str:
    """Where the original keeps the module of one model-parallel rank."""
    return os.path.join(base_folder, f"mp_rank_{mp_rank_str}_model_states.pt")


def get_zero_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """Where the original keeps the optimizer states of one rank."""
    return os.path.join(base_folder, f"zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt")


def is_model_parallel_parameter(p: nn.Parameter) -> bool:
    """Whether a tensor-parallel layer marked it as divided."""
    return bool(getattr(p, "model_parallel", False) or getattr(p, "tensor_model_parallel", False))
