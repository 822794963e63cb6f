"""`deepspeed.runtime.sequence_parallel.ulysses_sp`: Ulysses for models of Transformers, as Accelerate calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ds_compat.comm import groups
from ds_compat.sequence.groups import SequenceMpu
from ds_layers import SequenceBatches, SequenceParallelAttention
from ds_layers import register_with_transformers as register


class UlyssesSPAttentionHF:
    """Registers Ulysses with Transformers."""

    @classmethod
    def register_with_transformers(
        cls,
        model_name_or_path: Any,
        core_attn_implementation: str = "sdpa",
        sequence_parallel_size: int = 1,
        micro_batch_size: int = 1,
        seq_length: int | None = None,
        seq_length_is_variable: bool = True,
        disable_in_eval: bool = False,
        **_: Any,
    ) -> SequenceMpu | None:
        """Makes a model, or all models that will be loaded with `attn_implementation=core_attn_implementation`, attend
        over the sequences of `sequence_parallel_size` consecutive ranks. Collective.

        Args:
            model_name_or_path: a model, or a name, for models that are loaded afterwards.
            core_attn_implementation: must be "sdpa": torch's kernel, which selects Flash Attention where it can.
            micro_batch_size: accepted without effect: shapes are those of the batch.
            seq_length: number of tokens of all ranks; only checked.
            disable_in_eval: in evaluation mode, sequences are whole on every rank.

        Returns:
            The process groups, for `deepspeed.initialize(mpu=...)`; None for one rank.

        Raises:
            ValueError: a length that the ranks do not divide, or another core attention.
        """
        if sequence_parallel_size <= 1:
            return None
        if core_attn_implementation != "sdpa":
            raise ValueError(
                f"core_attn_implementation={core_attn_implementation!r} is not supported: use 'sdpa', for which torch "
                "selects Flash Attention where it can"
            )
        if seq_length is not None and not seq_length_is_variable and seq_length % sequence_parallel_size:
            raise ValueError(
                f"seq_length {seq_length} is not a multiple of {sequence_parallel_size} sequence-parallel ranks"
            )
        mpu = SequenceMpu(sequence_parallel_size)
        groups.set_mpu(mpu)
        attention = SequenceParallelAttention(
            mpu.get_sequence_parallel_group(), disable_in_eval=disable_in_eval
        )
        if isinstance(model_name_or_path, nn.Module):
            register(attention, model=model_name_or_path)
        else:
            register(attention, name=core_attn_implementation)
        return mpu


class UlyssesSPDataLoaderAdapter(SequenceBatches):
    """Divides the batches of a loader among sequence-parallel ranks. Each rank loads other batches, and the ranks
    process the batches of each together, one after the other. A batch has `input_ids`, and may have `labels`, which
    become `shift_labels`.
    """

    def __init__(
        self,
        dl: Any,
        sp_rank: int,
        sp_group: Any,
        sp_world_size: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dl, sp_group, device=device)
        self.dl, self.sp_rank, self.sp_group, self.sp_world_size = dl, sp_rank, sp_group, sp_world_size
