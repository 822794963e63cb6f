"""Who speaks for a model: packages that registered and are imported, whoever is passed, or the tensors themselves."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import ds_zero
from ds_checkpoint.owners import owner_of
from ds_checkpoint.owners.plain import PlainOwner


def test_the_owner_of_a_sharded_model_is_ds_zero() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    assert type(owner_of(model, optimizer)) is PlainOwner
    ds_zero.shard(model, optimizer, stage=2)
    assert type(owner_of(model, optimizer)).__module__.startswith("ds_zero")
    assert type(owner_of(model, optimizer, [])) is PlainOwner
    other = torch.optim.SGD(nn.Linear(1, 1).parameters())
    with pytest.raises(ValueError, match="the optimizer was not sharded with this model"):
        owner_of(model, other)


def test_claims_that_are_passed_are_asked_in_order() -> None:
    asked: list[str] = []

    class Mine:
        def records(self) -> list[Any]:
            return []

        def load_records(self, source: Any) -> None:
            raise NotImplementedError

    mine = Mine()
    claims = [
        lambda m, o: asked.append("first"),
        lambda m, o: mine,
        lambda m, o: pytest.fail("asked too far"),
    ]
    assert owner_of(nn.Linear(1, 1), None, claims) is mine and asked == ["first"]


def test_a_package_that_is_not_imported_is_not_asked_and_not_imported() -> None:
    code = (
        "import sys, tempfile, torch, ds_checkpoint\n"
        "ds_checkpoint.save(tempfile.mkdtemp(), torch.nn.Linear(2, 2))\n"
        "assert 'ds_zero' not in sys.modules and 'ds_engine' not in sys.modules\n"
        "import importlib.metadata as m\n"
        "assert [e.name for e in m.entry_points(group='ds_checkpoint.owners')] == ['ds-zero']\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=100)
