"""Batches for sequence-parallel ranks: whole sequences in, this rank's tokens out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset

from ds_layers.sequence.layout import SequenceLayout
from ds_layers.sequence.ulysses import Group, process_group

Batch = dict[str, Any]


def divide_batch(
    batch: Mapping[str, Any],
    layout: SequenceLayout,
    rank: int,
    *,
    pad_token: int = 0,
    ignore_index: int = -100,
) -> Batch:
    """Returns this rank's tokens of a batch.

    Tensors with as many columns as `input_ids` are divided along dimension 1. The sequence is padded at the end to a
    multiple that can be divided. `labels` become `shift_labels`: for each token the label of the next one, before the
    division. `position_ids` are added if there are none.

    Args:
        batch: `input_ids` (batch, tokens) and other tensors, as for a causal language model.
        layout: how tokens are divided.
        rank: index of this rank in the sequence-parallel group.
        pad_token: the value of `input_ids` in the padding.
        ignore_index: the label of tokens without a loss.

    Raises:
        ValueError: no `input_ids` or `inputs_embeds`, or a batch that was divided before.
    """
    inputs = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(inputs, Tensor) or inputs.ndim < 2:
        raise ValueError(
            f"a batch must have input_ids (batch, tokens) to be divided along the sequence, and has {sorted(batch)}"
        )
    tokens = inputs.shape[1]
    _refuse_divided(batch, tokens)
    whole = dict(batch)
    if "position_ids" not in whole:
        whole["position_ids"] = torch.arange(tokens, device=inputs.device).expand(inputs.shape[0], tokens)
    if "labels" in whole:
        labels = whole.pop("labels")
        whole["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    target = layout.padded(tokens)
    ranges = layout.ranges(rank, target)
    fill = {"input_ids": pad_token, "shift_labels": ignore_index}
    own: Batch = {}
    for name, value in whole.items():
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == tokens:
            value = _padded(name, value, target, fill.get(name, 0))
            value = torch.cat([value[:, begin:end] for begin, end in ranges], 1).contiguous()
        own[name] = value
    return own


class SequenceBatches(IterableDataset[Batch]):
    """A loader of whole sequences as a loader of this rank's tokens."""

    def __init__(
        self,
        loader: Iterable[Mapping[str, Any]],
        group: Group | None = None,
        *,
        layout: SequenceLayout | None = None,
        shared: bool = False,
        device: torch.device | str | None = None,
        pad_token: int = 0,
    ) -> None:
        """Wraps a loader.

        Args:
            loader: yields dicts with `input_ids` and others, on every rank of the group.
            group: the sequence-parallel ranks. Default: all ranks.
            layout: how tokens are divided. Default: contiguous parts.
            shared: the ranks of a group load the same batches, which are divided as they are. Otherwise each rank
                loads other batches, as with a sampler over all ranks, and the ranks process the batches of each
                together, one after the other.
            device: where tensors are moved. Default: they stay.
            pad_token: the value of `input_ids` in the padding.

        Raises:
            ValueError: the loader divides sequences already.
        """
        self._loader, self._shared, self._device, self._pad = loader, shared, device, pad_token
        self._group = process_group(group)
        self._size = self._group.size() if self._group is not None else 1
        self.layout: SequenceLayout = layout or SequenceLayout(size=self._size)
        if isinstance(loader, SequenceBatches):
            raise ValueError(
                f"the loader divides sequences among {loader.layout.size} ranks already: a sequence is divided once"
            )
        if self.layout.size != self._size:
            raise ValueError(f"the layout is for {self.layout.size} ranks, and the group has {self._size}")

    def __len__(self) -> int:
        count = len(self._loader)  # type: ignore[arg-type]
        return count if self._shared else count * self._size

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)  # batch_size, sampler, dataset, as code asks of loaders

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches. Collective unless `shared`; an error of one rank's loader is raised on every rank."""
        iterator = iter(self._loader)
        rank = self._group.rank() if self._group is not None else 0
        if self._shared or self._group is None:
            for batch in iterator:
                yield self._own(batch, rank)
            return
        while True:
            error: BaseException | None = None
            mine: Any = None
            try:
                mine = next(iterator, None)
                mine = None if mine is None else {n: _on_host(v) for n, v in mine.items()}
            except Exception as own:  # noqa: BLE001  # the others wait for this rank
                error, mine = own, f"{type(own).__name__}: {own}"
            gathered: list[Any] = [None] * self._size
            dist.all_gather_object(gathered, mine, group=self._group)
            if error is not None:
                raise error
            for index, batch in enumerate(gathered):
                if isinstance(batch, str):
                    raise RuntimeError(f"the loader of sequence-parallel rank {index} failed: {batch}")
            if any(batch is None for batch in gathered):
                return  # like DistributedSampler with drop_last: only rounds in which every rank has a batch
            for batch in gathered:
                yield self._own(batch, rank)

    def _own(self, batch: Mapping[str, Any], rank: int) -> Batch:
        own = divide_batch(batch, self.layout, rank, pad_token=self._pad)
        if self._device is None:
            return own
        return {n: v.to(self._device) if isinstance(v, Tensor) else v for n, v in own.items()}


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _refuse_divided(batch: Mapping[str, Any], tokens: int) -> None:
    positions = batch.get("position_ids")
    first = int(positions[..., 0].min()) if isinstance(positions, Tensor) and positions.numel() else 0
    if first > 0:
        raise ValueError(
            f"the batch has positions {first} to {int(positions[..., -1].max())}, {tokens} tokens: the sequence was "  # type: ignore[index]
            "divided already, and is not divided again"
        )
    if "shift_labels" in batch:
        raise ValueError(
            f"the batch has shift_labels and {tokens} tokens: it was divided already, and is not divided again"
        )


def _padded(name: str, value: Tensor, target: int, fill: int) -> Tensor:
    missing = target - value.shape[1]
    if not missing:
        return value
    if name == "position_ids":
        more = value[:, -1:] + torch.arange(1, missing + 1, device=value.device)
        return torch.cat([value, more], 1)
    padding = value.new_full((value.shape[0], missing, *value.shape[2:]), fill)
    return torch.cat([value, padding], 1)
