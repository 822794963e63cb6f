"""`PipelineModule` and `Pipeline`: the training of one process, on every number of stages and data-parallel ranks."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_pipe.errors import PipelineError
from ds_pipe.model import (
    LayerProfile,
    LayerSpec,
    Pipeline,
    PipelineModule,
    TiedLayerSpec,
    profile_layers,
)
from harness import ranks
from pipe.executor.models import Block, batches, loss_fn

WIDTH, VOCAB = 8, 11


def head(embedding: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.linear(x, embedding.weight)


def layers(tied: bool = False, blocks: int = 8):
    body = [LayerSpec(Block, WIDTH) for _ in range(blocks)]
    if tied:
        first = TiedLayerSpec("embedding", nn.Embedding, VOCAB, WIDTH)
        return [
            first,
            *body,
            LayerSpec(nn.LayerNorm, WIDTH),
            TiedLayerSpec("embedding", nn.Embedding, VOCAB, WIDTH, forward_fn=head),
        ]
    return [LayerSpec(nn.Embedding, VOCAB, WIDTH), *body, torch.tanh, LayerSpec(nn.Linear, WIDTH, VOCAB)]


def items(step: int, data_rank: int, count: int):
    return zip(*batches(count, 10 * step + data_rank), strict=True)


def module(num_stages: int, tied: bool = False, **options) -> PipelineModule:
    return PipelineModule(layers(tied), num_stages, loss_fn=loss_fn, seed_layers=True, **options)


def whole(tied: bool = False) -> PipelineModule:
    """All layers in this process, which the topology of the job does not see."""
    torch.manual_seed(0)
    found = []
    shared = None
    for i, spec in enumerate(layers(tied)):
        torch.manual_seed(1234 + i)
        if isinstance(spec, TiedLayerSpec):
            shared = shared or spec.build()
            found.append(shared if spec.forward_fn is None else partial(spec.forward_fn, shared))
        else:
            found.append(spec.build() if isinstance(spec, LayerSpec) else spec)
    return found


def parameters_of(found):
    named = {}
    for i, layer in enumerate(found):
        layer = layer.args[0] if isinstance(layer, partial) else layer
        if isinstance(layer, nn.Module):
            named |= {f"{i}.{n}": p for n, p in layer.named_parameters()}
    return {
        n: p for i, (n, p) in enumerate(named.items()) if all(p is not q for q in list(named.values())[:i])
    }


def trained_alone(steps: int, count: int, data_ranks: int, tied: bool, clip: float | None):
    """One process: the gradients of every data-parallel rank are added up by themselves, then averaged."""
    found = whole(tied)
    params = parameters_of(found)
    optimizer = torch.optim.SGD(params.values(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        sums = []
        total = torch.zeros(())
        for rank in range(data_ranks):
            mine = torch.zeros(())
            for x, y in items(step, rank, count):
                for layer in found:
                    x = layer(x)
                loss = loss_fn(x, y)
                mine += loss.detach() / count
                (loss / count).backward()
            total += mine
            sums.append([p.grad.clone() for p in params.values()])
            optimizer.zero_grad()
        for p, *grads in zip(params.values(), *sums, strict=True):
            p.grad = sum(grads[1:], grads[0]) / data_ranks
        if clip is not None:
            norm = torch.sqrt(sum(p.grad.double().square().sum() for p in params.values()))
            for p in params.values():
                p.grad.mul_(min(1.0, float(clip / (norm + 1e-6))))
        losses.append((total / data_ranks).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {n: p.detach() for n, p in params.items()}


def trained(num_stages: int, count: int, steps: int, *, tied=False, clip=None, **options):
    built = module(num_stages, tied, **options)
    pipeline = Pipeline(built, count)
    optimizer = torch.optim.SGD(built.parameters(), lr=0.1, momentum=0.9)
    data_rank = built.process_topology.get_coord(dist.get_rank()).data
    losses = []
    for step in range(steps):
        losses.append(pipeline.forward_backward(items(step, data_rank, count)).item())
        if clip is not None:
            pipeline.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
    pipeline.close()
    return losses, built


CASES = [
    pytest.param(s, n, c, r, marks=[] if (s, n, c, r) in THIN else pytest.mark.full)
    for THIN in [
        {("1f1b", 2, 4, False), ("zb-v", 2, 8, True), ("interleaved", 4, 4, False), ("zb-h1", 2, 4, False)}
    ]
    for s, n, c, r in itertools.product(
        ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipev"), (2, 4), (4, 8), (False, True)
    )
    if s != "dualpipev" or c >= 2 * n
]


@ranks(4)
@pytest.mark.parametrize("schedule, num_stages, count, recompute", CASES)
def test_losses_and_weights_are_those_of_one_process(schedule, num_stages, count, recompute):
    interval = 1 if recompute else 0
    losses, built = trained(num_stages, count, 10, schedule=schedule, activation_checkpoint_interval=interval)
    expected, weights = trained_alone(10, count, 4 // num_stages, False, None)
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, param in built.named_parameters():
        assert torch.equal(param, weights[name]), name


@ranks(2, 4)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_tied_weights_and_norms(schedule, world_size):
    losses, built = trained(2, 4, 10, tied=True, clip=0.5, schedule=schedule)
    expected, weights = trained_alone(10, 4, world_size // 2, True, 0.5)
    assert losses == pytest.approx(expected, rel=1e-5)
    renamed = {"tied_modules.embedding.weight": "0.weight"}
    for name, param in built.named_parameters():
        torch.testing.assert_close(param.detach(), weights[renamed.get(name, name)], rtol=1e-4, atol=1e-6)


@ranks(2)
def test_only_the_layers_of_a_rank_are_constructed():
    made = []

    class Noted(nn.Linear):
        def __init__(self, index):
            super().__init__(2, 2)
            if self.weight.device.type != "meta":
                made.append(index)

    built = PipelineModule([LayerSpec(Noted, i) for i in range(6)], 2)
    first = 3 * dist.get_rank()
    assert made == [first, first + 1, first + 2]
    assert [n for n, _ in built.named_parameters()] == [
        f"{i}.{n}" for i in range(first, first + 3) for n in ("weight", "bias")
    ]


@ranks(2)
def test_evaluation_and_the_same_loss_on_all_ranks():
    built = module(2, schedule="zb-v")
    pipeline = Pipeline(built, 4)
    before = [p.clone() for p in built.parameters()]
    loss, outputs = pipeline.evaluate(items(0, 0, 4), return_outputs=True)
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(built.parameters(), before, strict=True))
    assert len(outputs) == (4 if dist.get_rank() == 0 else 0)
    trained_loss = pipeline.forward_backward(items(0, 0, 4))
    both = [torch.zeros(()), torch.zeros(())]
    dist.all_gather(both, trained_loss)
    assert loss == trained_loss == both[0] == both[1]
    pipeline.set_num_microbatches(6)
    assert pipeline.forward_backward(items(0, 0, 6)) == pipeline.evaluate(items(0, 0, 6))[0]
    # Without a loss function it is the mean of the outputs, whatever their shape.
    plain = Pipeline(PipelineModule(layers(), 2), 4)
    loss, outputs = plain.evaluate(items(0, 0, 4), return_outputs=True)
    assert not outputs or loss == pytest.approx(torch.stack(outputs).mean().item(), rel=1e-5)
    plain.close()
    # Data that end too early on one rank are an error on all.
    with pytest.raises(PipelineError, match="rank 0 ended after 3 of 6"):
        pipeline.forward_backward(list(items(0, 0, 6))[: 3 if dist.get_rank() == 0 else 6])
    pipeline.close()


def alone(specs, **options):
    return PipelineModule(specs, 1, **options)


def test_one_process_needs_no_process_group():
    built = module(1)
    x = next(items(0, 0, 1))[0]
    expected = x
    for layer in whole():
        expected = layer(expected)
    assert torch.equal(built(x), expected)


@pytest.mark.parametrize(
    "method, parts",
    [
        ("uniform", [0, 3, 5]),
        ("parameters", [0, 4, 5]),
        ("type:linear", [0, 3, 5]),
        ([0, 1, 5], [0, 1, 5]),
        (LayerProfile(seconds=(1, 1, 1, 1, 9), parameter_bytes=(0,) * 5), [0, 4, 5]),
    ],
)
def test_partition_methods(method, parts):
    from ds_pipe.model.pipeline_module import _bounds

    specs = [
        LayerSpec(nn.Linear, 2, 2),
        LayerSpec(nn.ReLU),
        LayerSpec(nn.Linear, 2, 2),
        LayerSpec(nn.Linear, 2, 2),
        LayerSpec(nn.Linear, 2, 50),
    ]
    bounds = _bounds(specs, method, 2)
    assert bounds == parts or (method == "type:linear" and bounds in ([0, 3, 5], [0, 2, 5]))


def test_measured_layers_divide_by_time_and_memory():
    ticks = iter(range(1000))
    profile = profile_layers(layers(), batches(1)[0][0], repeats=2, clock=lambda: float(next(ticks)))
    assert profile.seconds == (1.0,) * 11
    assert profile.parameter_bytes[0] == VOCAB * WIDTH * 4 and profile.parameter_bytes[9] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"partition_method": "parameter"}, "none of 'uniform'"),
        ({"partition_method": "profile"}, "pass profile_layers"),
        ({"partition_method": "type:conv"}, "no layer matches"),
        ({"partition_method": [0, 4]}, "ascending numbers from 0 to 11"),
        ({"num_stages": 2}, "does not divide the 1 ranks"),
        ({"num_stages": None}, "needs num_stages or topology"),
        ({"activation_checkpoint_interval": -1}, "0 keeps activations"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PipelineModule(layers(), **{"num_stages": 1, **options})


def test_only_named_classes_are_recomputed():
    calls = []

    def noted(function, value):
        calls.append(1)
        return function(value)

    x = batches(1)[0][0]
    for names, expected in ((None, 10), (["Block"], 8), (["Linear"], 1)):
        calls.clear()
        options = {
            "activation_checkpoint_interval": 1,
            "activation_checkpoint_func": noted,
            "checkpointable_layers": names,
        }
        PipelineModule(layers(), 1, **options)(x)
        assert len(calls) == expected
