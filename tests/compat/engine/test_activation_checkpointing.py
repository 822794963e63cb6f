"""The switches of DeepSpeed's module for activation checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepspeed
from ds_compat.engine import activation_checkpointing as home


def test_switches_say_what_is_configured() -> None:
    module = deepspeed.checkpointing
    module.configure(contiguous_checkpointing=True, num_checkpoints=3, checkpoint_in_cpu=True)
    try:
        assert module.CONTIGUOUS_CHECKPOINTING and module.CPU_CHECKPOINT and not module.PARTITION_ACTIVATIONS
        assert module.num_layers == 3 and module.deepspeed_checkpointing_enabled
        with pytest.raises(AssertionError, match="number of layers"):
            module.configure(contiguous_checkpointing=True)
    finally:
        module.configure(contiguous_checkpointing=False, checkpoint_in_cpu=False)
    assert not module.CPU_CHECKPOINT


def test_switches_that_are_written_hold_from_the_next_checkpoint_on(monkeypatch: pytest.MonkeyPatch) -> None:
    module = deepspeed.checkpointing
    module.configure(contiguous_checkpointing=False)
    layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    x = torch.randn(2, 4, requires_grad=True)
    with monkeypatch.context() as patched:
        patched.setattr(module, "CONTIGUOUS_CHECKPOINTING", True)  # its number of layers follows
        module.set_num_layers(3)
        module.partition_activations_in_checkpoint(True)  # without a group: no effect, as with one rank
        assert module.CONTIGUOUS_CHECKPOINTING and module.num_layers == 3
        hidden = x
        for layer in layers:
            hidden = module.checkpoint(layer, hidden)
        hidden.sum().backward()
        config = home._instance().config
        assert (config.contiguous, config.num_checkpoints, config.partition) == (True, 3, False)
        checkpointed = x.grad
    assert not module.CONTIGUOUS_CHECKPOINTING and not home._instance().config.contiguous
    x.grad = None
    layers[2](layers[1](layers[0](x))).sum().backward()
    assert torch.allclose(checkpointed, x.grad)
    module.reset()
