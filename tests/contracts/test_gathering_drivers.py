"""`UnitGathering` and `Control` have several drivers: module hooks, and an executor that gathers by explicit calls.

The executor runs a chain of blocks with no module hook in place, as a pipeline schedule does: each block is unsharded
for its forward, resharded, and unsharded again for its backward, which runs for each block by itself.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_zero import _registry
from ds_zero.runtime.bucket import BucketState
from harness import ranks
from zero.parity import everywhere

DIM, BLOCKS, STEPS = 8, 3, 2


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM)) for _ in range(BLOCKS))
    )


def data(step: int) -> Tensor:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.randn(4, DIM, generator=torch.Generator().manual_seed(10 * step + rank))


def sharded(**config: object) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = ds_zero.ZeroConfig(persistence_threshold_numel=0, **config)  # type: ignore[arg-type]
    return ds_zero.shard(model, optimizer, 3, config=options)


def states(model: nn.Module, block: nn.Module) -> set[BucketState]:
    ids = {id(p) for p in block.parameters()}
    buckets = _registry.state_of(model).buckets
    return {b.state for b in buckets if any(id(p) in ids for p in b.params)}


class Executor:
    """Forward and backward of a chain, block by block."""

    def __init__(self, model: nn.Sequential) -> None:
        self._blocks = list(model)
        self._controls = [ds_zero.control(model, block) for block in model]
        for handle in _registry.state_of(model).handles[:]:
            if type(handle).__name__ in ("RemovableHandle", "ParameterReadHook") and _is_module_hook(
                handle, model
            ):
                handle.remove()

    def run(self, x: Tensor) -> None:
        saved = []
        for block, control in zip(self._blocks, self._controls, strict=True):
            given = x.detach().requires_grad_()
            control.unshard()
            x = block(given)
            control.reshard()
            saved.append((given, x))
        grad = torch.autograd.grad(x.square().mean(), x)[0]
        ahead = self._controls[-1].unshard(async_op=True)
        for i in reversed(range(len(saved))):
            assert ahead is not None
            ahead.wait()
            if i > 0:
                ahead = self._controls[i - 1].unshard(async_op=True)
            given, out = saved[i]
            out.backward(grad)
            grad = given.grad
            self._controls[i].reshard()


def _is_module_hook(handle: object, model: nn.Module) -> bool:
    if type(handle).__name__ == "ParameterReadHook":
        return True
    tables = [t for m in model.modules() for t in (m._forward_pre_hooks, m._forward_hooks)]
    table = handle.hooks_dict_ref()  # type: ignore[attr-defined]
    hook = table.get(handle.id) if any(table is t for t in tables) else None  # type: ignore[attr-defined]
    return "_Around" in repr(getattr(hook, "__self__", None)) or "_Around" in repr(hook)


def by_hooks(**config: object) -> dict[str, Tensor]:
    model, optimizer = sharded(**config)
    for step in range(STEPS):
        model(data(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return everywhere(ds_zero.full_state_dict(model))


def by_executor() -> dict[str, Tensor]:
    model, optimizer = sharded()
    executor = Executor(model)
    for step in range(STEPS):
        executor.run(data(step))
        assert states(model, model) == {BucketState.SHARDED}
        optimizer.step()
        optimizer.zero_grad()
    return everywhere(ds_zero.full_state_dict(model))


@ranks(1, 2)
def test_an_executor_without_module_hooks_trains_alike() -> None:
    expected, found = by_hooks(), by_executor()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
