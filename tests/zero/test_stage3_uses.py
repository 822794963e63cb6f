"""Stage 3 under what models do with parameters and graphs; one process shards as many do, so most need no other."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import ds_zero
from ds_zero import _registry
from harness import ranks
from zero.models import assert_consumed

DIM = 8


class Body(nn.Module):
    """Blocks, of which subclasses make other uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(DIM, DIM)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    def loss(self, x: Tensor) -> Tensor:
        return self(x).square().mean()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class AuxBlock(Block):
    """Keeps a loss of its own as an attribute, computed after its output, from a parameter and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.aux = (self.up.weight @ self.down.weight).square().mean() + functional.linear(
            x, self.up.weight
        ).mean()
        return y


class Auxiliary(Body):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AuxBlock() for _ in range(3))

    def loss(self, x: Tensor) -> Tensor:
        return super().loss(x) + sum(block.aux for block in self.blocks)


class AuxiliaryAlone(Auxiliary):
    """Two backwards: the auxiliary losses have one without the model's output."""

    def loss(self, x: Tensor) -> Tensor:
        loss = Body.loss(self, x)
        sum(block.aux for block in self.blocks).backward(retain_graph=True)
        return loss


class LateRead(Body):
    """A branch that comes with the third step reads another module's parameter."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.step < 2 else functional.linear(y, self.blocks[0].up.weight)


class Asks(Body):
    """Reads only dtype and shape from outside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.blocks[1].up.weight.dtype)) * self.last.weight.shape[0]


class Giver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, DIM) / 4)

    def forward(self, view: bool) -> Tensor:
        return self.weight.t() if view else self.weight


class Returned(Body):
    """A module whose output is its parameter, another one whose output is a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.givers = nn.ModuleList(Giver() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = (giver(i == 1) for i, giver in enumerate(self.givers))
        return super().forward(x @ a) @ b


class SavesWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x, weight.t())
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def,override]
        x, transposed = ctx.saved_tensors
        return grad @ transposed.t() + 0 * (grad @ ctx.weight), grad.t() @ x


class CustomBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + SavesWeight.apply(self.down(x), self.up.weight)


class Custom(Body):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CustomBlock() for _ in range(3))


class InPlaceBlock(Block):
    """Changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1.0
        x.mul_(0.5)
        return super().forward(x)


class InPlace(Body):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InPlaceBlock() for _ in range(3))


class Empty(Body):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].nothing = nn.Parameter(torch.zeros(0, DIM))
        self.nothing = nn.Linear(0, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.nothing(x[:, :0])


class Attention(Body):
    """torch's own, which reads its children's parameters itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.attend = nn.MultiheadAttention(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x[None])[0]
        return x + self.attend(x, x, x, need_weights=False)[0]


class Checkpointed(Body):
    """Activation checkpointing around one block, around several, and inside of each other; frozen inputs."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        run = self._run
        x = checkpoint(self.blocks[0], x, use_reentrant=self.reentrant)
        x = checkpoint(
            lambda x: checkpoint(run, x, use_reentrant=self.reentrant), x, use_reentrant=self.reentrant
        )
        return self.last(x)

    def _run(self, x: Tensor) -> Tensor:
        return self.blocks[2](self.blocks[1](x))


class Reentrant(Checkpointed):
    reentrant = True


class AllReentrant(Body):
    """No parameter outside of the checkpointed part."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(DIM, 2, bias=False), nn.Linear(2, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class Lora(Body):
    """Frozen base, small adapters; activation checkpointing whose inputs need no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        for block in self.blocks:
            block.up, block.down = LowRank(block.up), LowRank(block.down)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


class Penalised(Body):
    """The gradient of the gradient (as in WGAN-GP)."""

    def loss(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        loss = super().loss(x)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + grad.square().sum()


class Twice(Body):
    """Two forwards before one backward, as in contrastive or adversarial training."""

    def loss(self, x: Tensor) -> Tensor:
        return super().loss(x) + super().loss(2 * x)


class Functional(Body):
    def loss(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self, dict(self.named_parameters()), (x,)).square().mean()


def batch(step: int, rank: int = 0) -> Tensor:
    return torch.randn(4, DIM, generator=torch.Generator().manual_seed(10 * step + rank))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    losses = []
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in range(steps):
        model.step = step  # type: ignore[assignment]
        if step == 2:
            with torch.no_grad():
                losses.append(model.eval()(batch(9)).sum().item())
            with torch.inference_mode():
                losses.append(model(batch(8)).sum().item())
            model.train()
        loss = model.loss(batch(step, rank))  # type: ignore[operator]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def build(make: type[nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = make()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


pytestmark = [
    pytest.mark.filterwarnings("ignore:modules ran in another order"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

CASES = [
    Auxiliary, AuxiliaryAlone, LateRead, Asks, Returned, Custom, InPlace, Empty, Attention, Checkpointed, Reentrant,
    AllReentrant, Lora, Penalised, Twice, Functional,
]  # fmt: skip


@pytest.mark.parametrize("make", CASES)
def test_stage_3_trains_as_plain_pytorch(make: type[nn.Module]) -> None:
    """Bitwise, and nothing stays gathered."""
    plain, plain_optimizer = build(make)
    expected = train(plain, plain_optimizer)
    model, optimizer = build(make)
    ds_zero.shard(model, optimizer, 3, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
    assert train(model, optimizer) == expected
    found = ds_zero.full_state_dict(model)
    assert all(torch.equal(found[n], p) for n, p in plain.named_parameters())
    assert ds_zero.memory(model, optimizer).gathered_bytes == 0
    assert_consumed(model)


@ranks(2)
@pytest.mark.parametrize(
    "make", [Auxiliary, LateRead, Returned, Reentrant, AllReentrant, Penalised, Attention]
)
def test_stage_3_trains_as_stage_0_on_ranks(make: type[nn.Module]) -> None:
    results = []
    for stage in (0, 3):
        model, optimizer = build(make)
        config = ds_zero.ZeroConfig(persistence_threshold_numel=0, accumulation="sharded")
        ds_zero.shard(model, optimizer, stage, config=config)
        results.append((train(model, optimizer), ds_zero.full_state_dict(model)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in results[0][1])


@pytest.mark.parametrize("make", [Reentrant, AllReentrant, Checkpointed])
def test_a_checkpointed_model_reduces_once_a_backward(make: type[nn.Module]) -> None:
    """Backwards inside of a backward are part of it."""
    model, optimizer = build(make)
    ds_zero.shard(model, optimizer, 1)
    state = _registry.state_of(model)
    ends = []
    flush = state.reducer._flush
    state.reducer._flush = lambda: (ends.append(1), flush())  # type: ignore[method-assign]
    train(model, optimizer, 3)
    del state.reducer._flush
    assert len(ends) == 3


def test_what_was_only_asked_is_not_gathered() -> None:
    model, optimizer = build(Asks)
    ds_zero.shard(
        model, optimizer, 3, config=ds_zero.ZeroConfig(persistence_threshold_numel=0, prefetch=False)
    )
    train(model, optimizer, 1)
    seen: list[int] = []
    model.first.register_forward_hook(lambda *_: seen.append(ds_zero.memory(model, optimizer).gathered_bytes))
    train(model, optimizer, 1)
    assert seen == [0]  # what the model asked about is not there while its first module runs


def test_torch_func_on_sharded_values_is_refused() -> None:
    model, optimizer = build(Body)
    ds_zero.shard(model, optimizer, 3, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).square().mean()

    taken = {n: p.detach() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"'weight' was taken from a parameter.*ds_zero\.gathered"):
        torch.func.functional_call(model, taken, (batch(0),))
    with pytest.raises(ValueError, match=r"ds_zero\.gathered"):
        torch.func.grad(loss)(taken, batch(0))
    with pytest.raises(ValueError, match=r"inside a torch\.func transform.*ds_zero\.gathered"):
        torch.func.vmap(model)(batch(0))


def test_torch_func_inside_gathered() -> None:
    plain, _ = build(Body)
    model, optimizer = build(Body)
    ds_zero.shard(model, optimizer, 3, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))

    def per_sample(which: nn.Module) -> dict[str, Tensor]:
        def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(which, params, (x[None],)).square().mean()

        params = {n: p.detach() for n, p in which.named_parameters()}
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, batch(0))
        return {n: g.clone() for n, g in found.items()}

    with ds_zero.gathered(model.parameters()):
        found = per_sample(model)
    expected = per_sample(plain)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert train(model, optimizer) == train(*build(Body))


def test_an_ordinary_module_after_destroy_and_in_a_copy() -> None:
    model, optimizer = build(Body)
    ds_zero.shard(model, optimizer, 3, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
    assert type(copy.deepcopy(model.first)._parameters) is dict
    ds_zero.destroy(model)
    assert all(type(m._parameters) is dict for m in model.modules())
    gc.collect()


def test_hooks_hold_no_model_alive() -> None:
    import weakref

    model, optimizer = build(Body)
    ds_zero.shard(model, optimizer, 3, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
    train(model, optimizer, 2)
    pointer = weakref.ref(model)
    gc.disable()
    try:
        del model, optimizer
        assert pointer() is None
    finally:
        gc.enable()


def test_a_failed_backward_inside_a_checkpoint_leaves_a_model_that_works() -> None:
    model, optimizer = build(Checkpointed)
    ds_zero.shard(model, optimizer, 3, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
    loss: Callable[[Tensor], Tensor] = model.loss  # type: ignore[assignment]
    out = loss(batch(0))
    model.blocks[1].up.weight.register_hook(lambda g: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        out.backward()
    model.blocks[1].up.weight._backward_hooks.clear()
    with pytest.warns(UserWarning, match="previous backward did not finish"):
        loss(batch(0)).backward()
    optimizer.step()
    assert ds_zero.memory(model, optimizer).gathered_bytes == 0
