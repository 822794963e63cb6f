"""Faults that users of other pipelines have reported: none of them is here, in the engine and in a plain loop."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_engine
from ds_pipe.model import LayerSpec, Pipeline, PipelineModule
from engine.pipeline.test_training import COUNT, config, weights_of
from harness import ranks
from pipe.model.test_pipeline import items, layers, parameters_of, whole

PADDING = -100


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=PADDING)


def num_tokens(target: Tensor) -> int:
    return int((target != PADDING).sum())


def padded(step: int, data_rank: int):
    """Micro-batches of which every one, and every data-parallel rank, has another number of tokens."""
    for m, (x, y) in enumerate(items(step, data_rank, COUNT)):
        y = y.clone()
        y[:, 1 + m + data_rank :] = PADDING
        yield x, y


def one_process(weigh) -> tuple[float, dict[str, Tensor], Tensor]:
    """Loss, weights and norm of the gradient after a step on all data at once, the loss divided once."""
    found = whole()
    params = parameters_of(found)
    pairs = [pair for rank in range(2) for pair in padded(0, rank)]
    total = sum(num_tokens(y) for _, y in pairs)
    mean = torch.zeros(())
    for x, y in pairs:
        for layer in found:
            x = layer(x)
        mean = mean + token_loss(x, y) * (num_tokens(y) / total if weigh else 1 / len(pairs))
    mean.backward()
    norm = torch.sqrt(sum(p.grad.double().square().sum() for p in params.values()))
    torch.optim.SGD(params.values(), lr=0.1).step()
    return mean.item(), {n: p.detach() for n, p in params.items()}, norm


def is_step_of_one_process(weigh, loss, weights, norm) -> None:
    expected_loss, expected, expected_norm = one_process(weigh)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    assert float(norm) == pytest.approx(float(expected_norm), rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@ranks(4)
def test_gradients_are_divided_once_and_count_every_token_the_same():
    """Gradients and their norm with 2 stages and 2 data-parallel ranks, with and without weights of losses.

    DeepSpeed #8152: every stage divided by the number of accumulated micro-batches again. torchtitan #2972: gradients
    of a pipeline were not divided by the number of tokens.
    """
    for weigh in (None, num_tokens):
        built = PipelineModule(layers(), 2, loss_fn=token_loss, seed_layers=True)
        pipeline = Pipeline(built, COUNT)
        optimizer = torch.optim.SGD(built.parameters(), lr=0.1)
        index = built.process_topology.get_coord(dist.get_rank()).data
        loss = pipeline.forward_backward(padded(0, index), loss_weights=weigh)
        norm = pipeline.clip_grad_norm_(1e9)
        optimizer.step()
        is_step_of_one_process(weigh, loss, {n: p.detach() for n, p in built.named_parameters()}, norm)
        pipeline.close()
        for stage in (0, 2):
            built = PipelineModule(layers(), 2, loss_fn=token_loss, seed_layers=True)
            sgd = {"type": "SGD", "params": {"lr": 0.1}}
            engine, *_ = ds_engine.initialize(built, config(stage, 1e9, optimizer=sgd))
            data = padded(0, engine.topology.data.index)
            loss = engine.train_batch(data, loss_weights=weigh)
            is_step_of_one_process(weigh, loss, weights_of(engine), engine.get_global_grad_norm())
            engine.destroy()
    # Without any token there is nothing to learn, instead of a division by zero.
    pipeline = Pipeline(PipelineModule(layers(), 2, loss_fn=lambda y, t: y.mean()), COUNT)
    empty = [(x, torch.full_like(y, PADDING)) for x, y in padded(0, 0)]
    assert pipeline.forward_backward(empty, loss_weights=num_tokens) == 0
    pipeline.close()


class Numbered(nn.Module):
    """Hands on the number of the micro-batch beside its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, value):
        x, number = value
        return torch.tanh(self.inner(x)), number


def paired(output, labels) -> Tensor:
    x, number = output
    y, own = labels
    assert number == own and x.shape == y.shape, f"the output of {number} meets the labels of {own}"
    return nn.functional.mse_loss(x, y)


@ranks(4)
def test_random_lengths_in_four_stages_meet_their_own_labels():
    """Megatron-LM #5100: four stages deadlocked when lengths vary. DeepSpeed #5729: outputs met the labels of another
    micro-batch.
    """
    built = PipelineModule([LayerSpec(Numbered) for _ in range(4)], 4, loss_fn=paired, seed_layers=True)
    engine, *_ = ds_engine.initialize(built, config(1))
    generator = torch.Generator().manual_seed(0)

    def batches(step: int, count: int = COUNT):
        """One reader for all: what the first rank reads as inputs the last rank has to read as labels."""
        for m in range(count):
            rows = int(torch.randint(0, 30, (), generator=generator)) + 1
            x, y = torch.randn(2, rows, 4, generator=generator)
            yield (x, (step, m)), (y, (step, m))

    for step in range(50):
        data = list(batches(step))  # every rank draws the same, also those that read nothing
        assert engine.train_batch(data) > 0
        if step % 10 == 0:
            loss, outputs = engine.eval_batch(data, return_logits=True)
            assert loss > 0
            if engine.is_last_stage():
                assert [(len(x), number) for x, number in outputs] == [(len(y), n) for _, (y, n) in data]
    engine.destroy()
