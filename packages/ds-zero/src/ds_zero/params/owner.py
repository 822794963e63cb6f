"""The state of a sharded model, for checkpoints."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.interfaces import RecordSource
from ds_zero.params.records import BUFFER, PARAM, ShardRecord, load_records, records


class Owner:
    """`records` and `load_records` of one model and its optimizer."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, states: bool) -> None:
        """`states`: whether to include optimizer states."""
        self._model = model
        self._optimizer = optimizer
        self._states = states

    def records(self) -> list[ShardRecord]:
        """Returns the records that this rank writes."""
        mine = records(self._model, self._optimizer)
        return mine if self._states else [r for r in mine if r.state in (PARAM, BUFFER)]

    def load_records(self, source: RecordSource) -> None:
        """Reads this rank's ranges. Collective.

        Raises:
            ValueError: the source lacks a tensor, or has it in another shape. Nothing has been changed then.
        """
        load_records(
            self._model,
            self._optimizer,
            source,
            optimizer_states=self._states,
            expect=getattr(source, "expect", None),
        )


def claim(model: nn.Module, optimizer: Optimizer | None) -> Owner | None:
    """Returns the owner of a model that `shard` has sharded; None for other models. An entry point of
    `ds_checkpoint.owners`.

    Raises:
        ValueError: the optimizer is not the one that was sharded with the model.
    """
    state = _registry.find(model)
    if state is None:
        return None
    own = state.optimizer() if state.optimizer is not None else None
    if optimizer is not None and _registry.find(optimizer) is not state:
        raise ValueError(
            "the optimizer was not sharded with this model: pass the objects that ds_zero.shard returned"
        )
    if own is None and optimizer is None:
        raise ValueError(
            "the model's optimizer was deleted: keep a reference to it as long as the model is sharded"
        )
    chosen = optimizer if optimizer is not None else own
    assert chosen is not None
    return Owner(model, chosen, states=optimizer is not None)
