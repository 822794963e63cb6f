"""`divided_init`: construction as it is, with parameters divided as soon as their module is made."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_zero import _registry
from ds_zero.params import divided_init as construction
from harness import ranks


class Scaled(nn.Module):
    """Looks at layers that it has made, ties two, and loads one from a file."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.outer = nn.Linear(8, 8, bias=False)
        self.outer.weight = self.inner.weight
        self.loaded = nn.Linear(8, 4)
        self.loaded.load_state_dict(torch.load(file, weights_only=True))
        self.inner.weight.data /= self.inner.weight.data.norm()
        self.gain = nn.Parameter(self.loaded.weight.detach().abs().max().reshape(1))
        self.copied = copy.deepcopy(self.loaded)
        self.table = torch.arange(8.0)
        self.register_buffer("scale", self.inner.weight.detach().clone())
        with torch.no_grad():
            self.copied.bias.add_(self.gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.copied(self.outer(self.inner(x + self.table))) * self.gain + self.loaded(x)


def _saved(tmp_path: Path, rank: int) -> Path:
    file = tmp_path / f"layer{rank}.pt"
    generator = torch.Generator().manual_seed(7)
    torch.save(
        {
            "weight": torch.randn(4, 8, generator=generator),
            "bias": torch.randn(4, generator=generator),
        },
        file,
    )
    return file


@ranks(2)
def test_values_are_those_of_ordinary_construction(tmp_path: Path) -> None:
    file = _saved(tmp_path, dist.get_rank())
    torch.manual_seed(3)
    ordinary = Scaled(file)
    drawn = torch.get_rng_state()
    torch.manual_seed(3)
    with ds_zero.divided_init(stage=3):
        model = Scaled(file)
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, param in model.named_parameters():
        whole = dict(ordinary.named_parameters())[name]
        if name.startswith("copied"):  # no module registers what copy.deepcopy makes: it stays whole
            assert torch.equal(param, whole)
            continue
        assert param.device == whole.device and param.shape == whole.shape and param.isnan().all()
        presence = ds_zero.presence(param)
        assert presence is not None and presence.divided and not presence.here
        assert presence.own is not None and presence.own.numel() == -(-param.numel() // 2)
        with ds_zero.gathered(param):
            assert torch.equal(param, whole)
    assert model.outer.weight is model.inner.weight and torch.equal(model.scale, ordinary.scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, stage=3)
    with ds_zero.gathered(model):
        for name, param in model.named_parameters():
            assert torch.equal(param, dict(ordinary.named_parameters())[name])


@ranks(2)
def test_rank_0s_values_win_where_ranks_draw_others() -> None:
    torch.manual_seed(dist.get_rank())
    with ds_zero.divided_init():
        layer = nn.Linear(3, 5)
    torch.manual_seed(0)
    first = nn.Linear(3, 5)
    with ds_zero.gathered(layer):
        assert torch.equal(layer.weight, first.weight)


@ranks(2)
def test_no_more_than_a_module_is_whole_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(construction, "WHOLE_BYTES", 0)
    most = []

    def count(module: nn.Module, name: str, param: Tensor | None) -> None:
        records = [(p, _registry.find_record(p)) for p in seen]
        most.append(sum(p.numel() for p, record in records if record is not None and not record.hides(p)))
        if isinstance(param, nn.Parameter):
            seen.append(param)

    seen: list[nn.Parameter] = []
    with ds_zero.divided_init():
        handle = nn.modules.module.register_module_parameter_registration_hook(count)
        layers = nn.Sequential(*(nn.Linear(10, 10) for _ in range(6)))
        for layer in layers:
            nn.init.zeros_(layer.weight)
            assert (
                sum(not _hidden(p) for p in layers.parameters()) <= 2 + 1
            )  # the last layer's own, and this one
        handle.remove()
    assert max(most) <= 110 and all(_hidden(p) for p in layers.parameters())
    with ds_zero.gathered(layers):
        assert not layers[0].weight.any() and layers[0].bias.any()


def _hidden(param: nn.Parameter) -> bool:
    record = _registry.find_record(param)
    return record is not None and record.hides(param)


@ranks(2)
def test_memory_that_somebody_holds_is_divided_later() -> None:
    with ds_zero.divided_init():
        layer = nn.Linear(4, 4)
        view = layer.weight.data
        nn.Linear(4, 4)
        view.fill_(2.0)
    with ds_zero.gathered(layer.weight):
        assert (layer.weight == 2.0).all()


@ranks(2)
def test_a_cast_before_shard_casts_the_values() -> None:
    torch.manual_seed(0)
    ordinary = nn.Linear(4, 4).to(torch.bfloat16)
    torch.manual_seed(0)
    with ds_zero.divided_init():
        layer = nn.Linear(4, 4)
    layer.to(torch.bfloat16)
    with torch.no_grad():
        layer.bias.data = torch.ones(4, dtype=torch.bfloat16)
    ds_zero.shard(layer, torch.optim.SGD(layer.parameters(), lr=0.1), stage=3)
    with ds_zero.gathered(layer):
        assert torch.equal(layer.weight, ordinary.weight)
        assert (layer.bias == 1).all()


@ranks(2)
def test_a_write_by_any_rank_that_would_be_lost_raises_on_all() -> None:
    with ds_zero.divided_init():
        layer = nn.Linear(4, 4)
    own = dist.get_rank() == 1
    with pytest.raises(ValueError, match="would be lost"), ds_zero.gathered(layer):
        layer.weight.data.mul_(0.0 if own else 1.0)
    with ds_zero.gathered(layer):
        assert layer.weight.any()


def test_parameters_of_others_stay_as_they_are() -> None:
    whole = nn.Linear(2, 2)
    with ds_zero.divided_init():
        assert isinstance(nn.Embedding(3, 2, device="meta").weight, nn.Parameter)
        again = nn.Sequential(whole)
        numbers = nn.Module()
        numbers.index = nn.Parameter(torch.arange(3), requires_grad=False)
    assert not ds_zero.presence(numbers.index) and again[0].weight.isfinite().all()
