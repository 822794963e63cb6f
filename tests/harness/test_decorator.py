"""`@ranks` as authors of tests use it."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from harness import ranks


@dataclasses.dataclass(frozen=True)
class Case:
    """A value of a class that only this file has."""

    numel: int


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.fixture
def weights() -> torch.Tensor:
    return torch.arange(3.0)


@pytest.fixture(params=["one", "two"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@ranks(1, 2, 4)
@pytest.mark.parametrize("numel", [1, 1000])
def test_collectives_over_several_world_sizes(numel: int, world_size: int) -> None:
    assert dist.get_world_size() == world_size and dist.get_backend() == "gloo"
    x = torch.full((numel,), dist.get_rank() + 1.0)
    dist.all_reduce(x)
    assert x.tolist() == [world_size * (world_size + 1) / 2] * numel


@pytest.mark.parametrize("case", [Case(2), Case(3)], ids=str)
@pytest.mark.parametrize("function", [double])
@ranks(2)
def test_arguments_of_own_classes_and_fixtures(
    case: Case, function: Callable[[torch.Tensor], torch.Tensor], weights: torch.Tensor, name: str
) -> None:
    assert case.numel in (2, 3) and type(case) is Case
    assert function(weights).tolist() == [0.0, 2.0, 4.0] and function is double
    assert name in ("one", "two")


@ranks(2)
def test_tmp_path_is_shared(tmp_path: Path) -> None:
    (tmp_path / str(dist.get_rank())).write_text("here")
    dist.barrier()
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@ranks(2)
def test_monkeypatch_acts_on_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (7.0, 7.0, 7.0))
    assert os.getloadavg() == (7.0, 7.0, 7.0)


@ranks(2)
def test_monkeypatch_is_undone() -> None:
    assert os.getloadavg.__module__ == "posix"


@pytest.fixture
def _patched_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_PATCHED", "yes")


@pytest.mark.usefixtures("_patched_here")
@ranks(2)
def test_environment_is_that_of_the_test() -> None:
    assert os.environ["DS_PATCHED"] == "yes"
    assert int(os.environ["RANK"]) == int(os.environ["LOCAL_RANK"]) == dist.get_rank()
    assert int(os.environ["WORLD_SIZE"]) == int(os.environ["LOCAL_WORLD_SIZE"]) == 2


@ranks(2)
@pytest.mark.xfail(reason="the failure of a rank is an ordinary failure", strict=True)
def test_an_expected_failure() -> None:
    assert dist.get_rank() == 0


@ranks(2)
def test_each_body_has_one_thread_and_the_same_seed() -> None:
    assert torch.get_num_threads() == 1
    x = torch.rand(4)
    others = [torch.empty(4) for _ in range(2)]
    dist.all_gather(others, x)
    assert torch.equal(others[0], others[1])


@ranks(2)
def test_warnings_can_be_expected() -> None:
    with pytest.warns(UserWarning, match="as expected"):
        warnings.warn("as expected", stacklevel=1)


class TestMethods:
    @ranks(2)
    def test_method(self, weights: torch.Tensor) -> None:
        assert type(self).__name__ == "TestMethods"
        assert weights.shape == (3,)


@ranks(2, groups_may_stay=True)
def test_groups_of_a_mesh_may_stay() -> None:
    dist.new_group([0, 1])


def test_bodies_that_ranks_cannot_run() -> None:
    def inside() -> None: ...

    with pytest.raises(TypeError, match="defined inside a function"):
        ranks(2)(inside)
    with pytest.raises(TypeError, match="one or more world sizes"):
        ranks()
    with pytest.raises(TypeError, match="one or more world sizes"):
        ranks(0)
    with pytest.raises(TypeError, match="test_capture asks for capsys"):
        ranks(2)(test_capture)
    with pytest.raises(TypeError, match="coroutine"):
        ranks(2)(_coroutine)  # type: ignore[arg-type]


def test_capture(capsys: pytest.CaptureFixture[str]) -> None:
    print("on this process")
    assert capsys.readouterr().out == "on this process\n"


async def _coroutine() -> None: ...
