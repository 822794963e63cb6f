"""ds-layers for an engine: activation checkpointing and token dropping, as configured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from torch.distributed import ProcessGroup

from ds_engine.config.sections.activation_checkpointing import ActivationCheckpointingConfig
from ds_engine.config.sections.data.data_efficiency import RandomLtdConfig
from ds_engine.interfaces import Recompute, TokenDropper


def recompute(section: ActivationCheckpointingConfig, group: ProcessGroup | None) -> Recompute:
    """See `Engine.activation_checkpointing`."""
    from ds_layers import Checkpointing, CheckpointingConfig

    return Checkpointing(
        CheckpointingConfig(
            group=group,
            partition=section.partition_activations,
            on_host=section.cpu_checkpointing,
            contiguous=section.contiguous_memory_optimization,
            num_checkpoints=section.number_checkpoints,
            keep_outputs=tuple(section.keep_outputs),
            synchronize=section.synchronize_checkpoint_boundary or section.profile,
        )
    )


def token_dropper(
    layers: Sequence[nn.Module], section: RandomLtdConfig, along: Sequence[str] | None
) -> TokenDropper:
    """See `Pacing.drop_tokens`."""
    from ds_layers import DroppingConfig, TokenDropping

    config = DroppingConfig(
        batch_first=section.hidden_state_order != "seq_batch_dim", mask=section.model_mask_name
    )
    if along is not None:
        config = replace(config, along=tuple(along))
    return TokenDropping(layers, config)
