"""Data loaders, and DeepSpeed's function for random-LTD."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from ds_engine.build.data import Loader as DeepSpeedDataLoader
from ds_engine.build.data import RepeatingLoader

if TYPE_CHECKING:
    from ds_compat.engine.engine import DeepSpeedEngine

__all__ = ["DeepSpeedDataLoader", "RepeatingLoader", "convert_to_random_ltd"]


def convert_to_random_ltd(model: Any, convert_type: type[Any]) -> Any:
    """Makes the layers of a class drop tokens; the engine `model` stays the same object."""
    model._engine.pacing.drop_tokens(model.module, convert_type)
    return model


def loader(
    engine: DeepSpeedEngine,
    dataset: Dataset[Any],
    batch_size: int | None,
    route: str,
    sampler: Any,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> Any:
    """See `DeepSpeedEngine.deepspeed_io`."""
    if not (hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")):
        raise ValueError("Training data must be a torch Dataset")
    micro = batch_size or engine.train_micro_batch_size_per_gpu()
    pin = engine.device.type != "cpu"
    if sampler is not None or route != "train":
        if sampler is None:
            sampler = DistributedSampler(dataset, engine.world_size, engine.global_rank, shuffle=False)
        return DataLoader(
            dataset, micro, sampler=sampler, collate_fn=collate_fn, pin_memory=pin,
            drop_last=engine.dataloader_drop_last(),
        )  # fmt: skip
    return DeepSpeedDataLoader(
        dataset,
        micro_batch=micro,
        rank=engine.global_rank,
        ranks=engine.world_size,
        seed=engine._engine.config.seed or 0,
        collate_fn=collate_fn,
        pin_memory=pin,
    )
