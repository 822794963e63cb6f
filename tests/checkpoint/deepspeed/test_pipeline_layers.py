"""Weights of DeepSpeed's pipelines: `layer_XX-model_states.pt`, one file for each layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ds_checkpoint import CheckpointError, load_layers, save_layers
from ds_pipe.model import LayerSpec, PipelineModule, TiedLayerSpec


def head(embedding: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, embedding.weight)  # type: ignore[arg-type]


def module(seed: int, width: int = 6) -> PipelineModule:
    torch.manual_seed(seed)
    embed = TiedLayerSpec("embed", nn.Embedding, 9, width)
    last = TiedLayerSpec("embed", nn.Embedding, 9, width, forward_fn=head)
    body = [LayerSpec(nn.Linear, width, width), torch.tanh, LayerSpec(nn.BatchNorm1d, width)]
    return PipelineModule([embed, *body, last], num_stages=1)


def written_as_deepspeed(built: PipelineModule, folder: Path, middle: str = "") -> None:
    """The files that `PipelineModule.save_state_dict` of DeepSpeed 0.19 writes."""
    folder.mkdir(parents=True)
    for index, layer in (
        (0, built.tied_modules["embed"]),
        (1, built._modules["1"]),
        (3, built._modules["3"]),
    ):
        assert layer is not None
        torch.save(layer.state_dict(), folder / f"layer_{index:02d}{middle}-model_states.pt")


def is_same(a: PipelineModule, b: PipelineModule) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_layers_load_by_their_index(tmp_path: Path) -> None:
    saved, fresh = module(1), module(2)
    written_as_deepspeed(saved, tmp_path / "global_step3")
    (tmp_path / "latest").write_text("global_step3")
    assert not is_same(saved, fresh)
    load_layers(fresh, tmp_path, "global_step3")
    assert is_same(saved, fresh)
    other = module(3)
    load_layers(other, tmp_path / "global_step3")
    assert is_same(saved, other)


def test_written_files_are_those_of_deepspeed(tmp_path: Path) -> None:
    saved, fresh = module(1), module(2)
    written_as_deepspeed(saved, tmp_path / "theirs")
    ours = save_layers(saved, tmp_path / "ours")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert (
        sorted(path.name for path in (tmp_path / "ours").iterdir()) == names == sorted(p.name for p in ours)
    )
    for name in names:
        theirs, own = (torch.load(tmp_path / folder / name) for folder in ("theirs", "ours"))
        assert theirs.keys() == own.keys() and all(torch.equal(theirs[k], own[k]) for k in own)
    load_layers(fresh, tmp_path / "ours")
    assert is_same(saved, fresh)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    written_as_deepspeed(module(1), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"layer_00.*shape \(9, 6\), and in this Embedding \(9, 4\)"):
        load_layers(module(2, width=4), tmp_path / "a")
    (tmp_path / "a" / "layer_03-model_states.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"no file of layer 3 \(BatchNorm1d\), but of the layers \[0, 1\]"
    ):
        load_layers(module(2), tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="has no files layer_XX"):
        load_layers(module(2), tmp_path)


def test_the_rank_of_a_tied_output_layer_reads_the_file_of_the_embedding(tmp_path: Path) -> None:
    saved = module(1)
    written_as_deepspeed(saved, tmp_path / "a")

    class LastStage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 6)

        def local_layers(self) -> dict[int, nn.Module]:
            return {0: self.embed, 4: self.embed}

    last = LastStage()
    assert list(saved.local_layers()) == [0, 1, 3, 4]
    load_layers(last, tmp_path / "a")
    assert torch.equal(last.embed.weight, saved.tied_modules["embed"].weight)


def test_each_tensor_parallel_rank_has_its_files(tmp_path: Path) -> None:
    first, second = module(1), module(2)
    save_layers(first, tmp_path, part=(0, 2))
    save_layers(second, tmp_path, part=(1, 2))
    fresh = module(3)
    load_layers(fresh, tmp_path, part=(1, 2))
    assert is_same(fresh, second)
    with pytest.raises(
        CheckpointError, match="layer 0 was written by 2 tensor-parallel ranks, and part says 1"
    ):
        load_layers(fresh, tmp_path)
