"""Small models, their batches, and the equations of the optimizers written out for all ranks in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ds_comm.compress import Blocks
from ds_comm.compress.blocks import ALIGNMENT


def mlp(seed: int = 0, width: int = 40, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """20 inputs, one output, two hidden layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    ).to(dtype)


def batch(rank: int, step: int, size: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The same for the same rank and step, in every process."""
    generator = torch.Generator().manual_seed(7919 * step + rank)
    x = torch.randn(size, 20, generator=generator)
    weights = torch.linspace(-1, 1, 20)
    return x.to(dtype), torch.tanh(x @ weights).unsqueeze(1).to(dtype)


def loss_of(model: nn.Module, rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean squared error of one batch."""
    x, y = batch(rank, step, dtype=dtype)
    return (model(x) - y).square().mean()


def gradients(model: nn.Module, rank: int, step: int) -> list[Tensor]:
    """This rank's gradients, without leaving them in the model."""
    return list(torch.autograd.grad(loss_of(model, rank, step), list(model.parameters())))


@dataclass
class OneBitAdamOnAllRanks:
    """Algorithm 1 of the paper for all ranks, one tensor and one block after the other."""

    params: list[Tensor]
    world_size: int
    lr: float
    freeze_step: int
    block_numel: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    steps: int = 0
    momenta: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    worker: list[list[Tensor]] = field(default_factory=list)
    server: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        zeros = [torch.zeros_like(p) for p in self.params]
        self.momenta, self.variances, self.server = ([z.clone() for z in zeros] for _ in range(3))
        self.worker = [[z.clone() for z in zeros] for _ in range(self.world_size)]

    def step(self, gradients_of_ranks: Sequence[Sequence[Tensor]]) -> None:
        self.steps += 1
        beta1, beta2 = self.betas
        for i, p in enumerate(self.params):
            grads = [grads[i] for grads in gradients_of_ranks]
            if self.steps <= self.freeze_step:
                mean = torch.stack(grads).mean(0)
                self.momenta[i] = beta1 * self.momenta[i] + (1 - beta1) * mean
                self.variances[i] = beta2 * self.variances[i] + (1 - beta2) * mean.square()
            else:
                self.momenta[i] = self._reduced(i, [beta1 * self.momenta[i] + (1 - beta1) * g for g in grads])
            bias1 = 1 - beta1**self.steps
            bias2 = 1 - beta2 ** min(self.steps, self.freeze_step)
            p.mul_(1 - self.lr * self.weight_decay)
            p.sub_(self.lr * (self.momenta[i] / bias1) / ((self.variances[i] / bias2).sqrt() + self.eps))

    def _reduced(self, i: int, local: list[Tensor]) -> Tensor:
        sent = []
        for rank, momentum in enumerate(local):
            value = momentum + self.worker[rank][i]
            sent.append(self._signs(value))
            self.worker[rank][i] = value - sent[-1]
        value = torch.stack(sent).mean(0) + self.server[i]
        result = self._signs(value)
        self.server[i] = value - result
        return result

    def _signs(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x).view(-1)
        for begin, numel in Blocks.uniform(x.numel(), self.block_numel).table.tolist():
            part = x.reshape(-1)[begin : begin + numel]
            out[begin : begin + numel] = part.abs().mean() * torch.where(part < 0, -1.0, 1.0)
        return out.view_as(x)


def padded(numel: int) -> int:
    """Elements that a tensor takes in a buffer."""
    return -(-numel // ALIGNMENT) * ALIGNMENT
