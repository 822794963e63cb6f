"""The switches of DeepSpeed's module for activation checkpointing."""

from __future__ import annotations

import pytest

import deepspeed


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
