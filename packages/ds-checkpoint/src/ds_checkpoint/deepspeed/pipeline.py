"""The weights of DeepSpeed's pipelines, which have a file for each layer.

`layer_03-model_states.pt` contains the state dict of the layer with index 3; if layers are divided among
tensor-parallel ranks, there is one file for each, as `layer_03-model_01-model_states.pt`. A tied layer is in the files
of all its places in the list but those where it is called through a function (`forward_fn`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ds_checkpoint.deepspeed import files, inert
from ds_checkpoint.errors import CheckpointError

_NAME = re.compile(r"layer_(?P<layer>\d+)-(?:model_(?P<part>\d+)-)?model_states\.pt")


class HasLayers(Protocol):
    """A pipeline of which this rank has some layers, as `ds_pipe.model.PipelineModule`."""

    def local_layers(self) -> Mapping[int, nn.Module]:
        """Returns the modules of this rank by their index in the list of all layers. A tied one is there at each of
        its indices, also at those of other ranks.
        """


def load_layers(
    module: HasLayers,
    path: str | os.PathLike[str],
    tag: str | None = None,
    *,
    part: tuple[int, int] = (0, 1),
    strict: bool = True,
) -> None:
    """Loads the weights of a pipeline that DeepSpeed has saved into the layers of this rank.

    Every rank reads the files of its layers, so the numbers of stages may differ. To be called before the module is
    sharded: before `ds_engine.initialize` or `deepspeed.initialize`. Optimizer states are not read. No pickle is
    executed.

    Args:
        module: the pipeline, with the same list of layers.
        path: the directory that was passed to DeepSpeed's `save_checkpoint`, or the folder with the files.
        tag: name of the checkpoint. Default: the one that `latest` names.
        part: (index of this tensor-parallel rank, number of these ranks).
        strict: as for `load_state_dict`.

    Raises:
        FileNotFoundError: there are no such files.
        CheckpointError: a layer has no file, or other parameters than its file; nothing of that layer is changed.
    """
    root = Path(path)
    folder = next(
        (f for f in (files.locate(root, tag), root if tag is None else root / tag) if f and _found(f)), None
    )
    if folder is None:
        raise FileNotFoundError(
            f"{root} has no files layer_XX-model_states.pt (tag {tag!r}): pass the directory that was passed to "
            "DeepSpeed's save_checkpoint, or the folder with these files"
        )
    found = _found(folder)
    layers = module.local_layers()
    loaded: set[int] = set()
    for index, layer in layers.items():
        own = found.get(index, {})
        if own and len(own) != part[1]:
            raise CheckpointError(
                f"{folder}: layer {index} was written by {len(own)} tensor-parallel ranks, and part says {part[1]}: "
                "load it on as many, since only the layer knows how to join its parameters"
            )
        if own:
            _load(layer, own[part[0]], strict)
            loaded.add(id(layer))
    for index, layer in layers.items():
        if id(layer) not in loaded and layer.state_dict():
            raise CheckpointError(
                f"{folder} has no file of layer {index} ({type(layer).__name__}), but of the layers {sorted(found)}: "
                "it was written by a pipeline with another list of layers, or not copied completely"
            )


def _load(layer: nn.Module, file: Path, strict: bool) -> None:
    try:
        content = inert.read(file)
        if not isinstance(content, dict):
            raise CheckpointError(f"{file} contains no state dict")
        _check_shapes(layer, content, file)
        layer.load_state_dict(content, strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not fit {type(layer).__name__}: {error}") from None


def _check_shapes(layer: nn.Module, content: Mapping[Any, Any], file: Path) -> None:
    for name, own in layer.state_dict().items():
        other = content.get(name)
        if isinstance(other, torch.Tensor) and other.shape != own.shape:
            raise CheckpointError(
                f"{file}: {name} has the shape {tuple(other.shape)}, and in this {type(layer).__name__} "
                f"{tuple(own.shape)}"
            )


def _found(folder: Path) -> dict[int, dict[int, Path]]:
    """Index of a layer -> index of a part -> its file."""
    found: dict[int, dict[int, Path]] = {}
    for child in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(child.name)
        if match is not None:
            found.setdefault(int(match["layer"]), {})[int(match["part"] or 0)] = child
    return found


def save_layers(
    module: HasLayers, folder: str | os.PathLike[str], *, part: tuple[int, int] = (0, 1)
) -> list[Path]:
    """Writes the layers of this rank into the files that DeepSpeed's `PipelineModule.load_state_dir` reads.

    One data-parallel rank of each stage has to call it, with whole parameters: those of a sharded module inside of
    `with ds_zero.gathered(list(module.parameters())):`, which all ranks have to enter. A file that is there is
    replaced, at once.

    Args:
        module: the pipeline.
        folder: where the files are written; it is made if it does not exist.
        part: (index of this tensor-parallel rank, number of these ranks).

    Returns:
        The files.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    written, done = [], set[int]()
    for index, layer in module.local_layers().items():
        state = {name: value.detach().cpu().clone() for name, value in layer.state_dict().items()}
        if not state or id(layer) in done:  # a tied layer is written at its first place
            continue
        done.add(id(layer))
        middle = f"-model_{part[0]:02d}" if part[1] > 1 else ""
        file = root / f"layer_{index:02d}{middle}-model_states.pt"
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        torch.save(state, unfinished)
        unfinished.replace(file)
        written.append(file)
    return written
