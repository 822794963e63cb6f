"""`deepspeed.sequence.layer`: attention over the sequence of all ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import ds_layers


class DistributedAttention(ds_layers.DistributedAttention):
    """DeepSpeed's interface to `ds_layers.DistributedAttention`.

    Args:
        local_attention: called with queries, keys and values of some heads and all tokens.
        sequence_process_group: the ranks that have parts of the same sequences, in the order of their tokens.
        scatter_idx: dimension of the heads, which must be 2.
        gather_idx: dimension of the tokens: 0, or 1.
        sp_stream: accepted without effect: the exchange runs on the current stream.
    """

    def __init__(
        self,
        local_attention: Any,
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
    ) -> None:
        super().__init__(local_attention, sequence_process_group, scatter_idx, gather_idx)
        self.local_attn, self.spg = local_attention, sequence_process_group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int | None = None,
        rotary_pos_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the attention of this rank's tokens, in the layout of `query`.

        Args:
            batch_dim_idx: dimension of the batch, which is the other one of 0 and 1 than `gather_idx`.
            rotary_pos_emb: must be None.

        Raises:
            ValueError: another batch dimension.
            NotImplementedError: rotary embeddings.
        """
        if batch_dim_idx is not None and batch_dim_idx != 1 - self.gather_idx:
            raise ValueError(
                f"batch_dim_idx={batch_dim_idx} with gather_idx={self.gather_idx}: they must be 0 and 1, or 1 and 0"
            )
        if rotary_pos_emb is not None:
            raise NotImplementedError(
                "DistributedAttention(rotary_pos_emb=...) is not supported: rotate queries and keys before the call, "
                "with the positions of this rank's tokens"
            )
        return super().forward(query, key, value, *args, **kwargs)
