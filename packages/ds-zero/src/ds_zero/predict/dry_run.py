"""Running a model without memory, to count what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_zero.predict.allocation_tracker import Ledger
from ds_zero.predict.fake_ops import LeanOperations
from ds_zero.predict.model_copy import fake_copy


@contextmanager
def dry_run(model: nn.Module) -> Iterator[nn.Module]:
    """Yields a copy of the model, on fake tensors. While the context is open, operations take no memory, tensors have
    no values, and where the model asks for one it gets a guess, as in a plan.

    Args:
        model: on any device, also "meta"; it is not changed.

    Raises:
        ValueError: inside of the context, if the shape of a result depends on values that cannot be guessed.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.random.fork_rng(devices=[]), mode, Ledger(1, LeanOperations(mode), resizes=False):
        copied, _ = fake_copy(model, hollow=False)
        yield copied.train(model.training)
