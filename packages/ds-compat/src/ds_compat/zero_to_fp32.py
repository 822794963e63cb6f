"""Whole fp32 weights from a checkpoint folder, without ranks or devices: `zero_to_fp32.py` and its functions.

Reads our checkpoints and DeepSpeed's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from torch import Tensor, nn

import ds_zero
from ds_compat.checkpoint.state_files import (
    get_checkpoint_files,
    get_model_state_file,
    get_model_state_files,
    get_optim_files,
)
from ds_engine.checkpoint import CheckpointError, export, state_dict
from ds_engine.cli.sizes import parse_bytes

__all__ = [
    "convert_zero_checkpoint_to_fp32_state_dict",
    "convert_zero_checkpoint_to_state_dict",
    "get_checkpoint_files",
    "get_fp32_state_dict_from_zero_checkpoint",
    "get_model_state_file",
    "get_model_state_files",
    "get_optim_files",
    "load_state_dict_from_zero_checkpoint",
    "main",
]


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Tensor]:
    """Returns name -> whole fp32 values on the CPU.

    Raises:
        ValueError: there is no checkpoint, or it is damaged.
    """
    try:
        return state_dict(checkpoint_dir, tag, exclude_frozen=exclude_frozen_parameters)
    except (FileNotFoundError, CheckpointError) as error:
        raise ValueError(str(error)) from error


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Writes the weights to `pytorch_model.bin` or `model.safetensors`, or to several files with an index if they are
    larger than `max_shard_size`. Files of the same names are replaced atomically; all ranks may convert into one
    folder at the same time.
    """
    export(
        checkpoint_dir,
        output_dir,
        tag,
        layout="safetensors" if safe_serialization else "pt",
        max_shard_bytes=sys.maxsize if max_shard_size is None else parse_bytes(str(max_shard_size)),
        exclude_frozen=exclude_frozen_parameters,
        overwrite=True,
    )


convert_zero_checkpoint_to_state_dict = convert_zero_checkpoint_to_fp32_state_dict


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> nn.Module:
    """Loads the checkpoint's weights into a model on the CPU, and returns it.

    The model of an engine is made an ordinary model first, and the engine cannot be used any more, as in DeepSpeed.
    In that case it is collective.
    """
    values = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    if any(ds_zero.presence(param) is not None for param in model.parameters()):
        ds_zero.destroy(model)
    model = model.cpu()
    model.load_state_dict(values, strict=False)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint_dir")
    parser.add_argument("output_dir")
    parser.add_argument("--max_shard_size", default="5GB")
    parser.add_argument("--safe_serialization", action="store_true")
    parser.add_argument("-t", "--tag", default=None)
    parser.add_argument("--exclude_frozen_parameters", action="store_true")
    parser.add_argument("-d", "--debug", action="store_true")
    options = vars(parser.parse_args(arguments))
    options.pop("debug")
    convert_zero_checkpoint_to_fp32_state_dict(**options)


if __name__ == "__main__":
    main()
