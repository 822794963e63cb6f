"""Handling of ranks that save under different tags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from ds_compat.utils.logs import logger


class TagError(AssertionError, ValueError):
    """Ranks save one checkpoint under different tags, and `checkpoint.tag_validation` is "fail"."""


def tag_validation(config: Mapping[str, Any]) -> str:
    """Returns `checkpoint.tag_validation` in lower case; "warn" if it is not set."""
    section = config.get("checkpoint")
    return str(section.get("tag_validation", "warn")).lower() if isinstance(section, dict) else "warn"


def agreed_tag(tag: str, validation: str) -> str:
    """Returns the tag under which all ranks save, which is rank 0's. Collective.

    Args:
        validation: if tags differ, "fail" raises, "warn" warns on rank 0, and "ignore" does nothing.

    Raises:
        TagError: on every rank, if tags differ and `validation` is "fail".
    """
    if not dist.is_initialized():
        return tag
    tags: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(tags, tag)
    others = {rank: other for rank, other in enumerate(tags) if other != tags[0]}
    if others and validation != "ignore":
        said = ", ".join(f"rank {rank} {other!r}" for rank, other in list(others.items())[:4])
        message = f"checkpoint.tag_validation: ranks save under different tags: rank 0 {tags[0]!r}, {said}"
        if validation == "fail":
            raise TagError(f"{message}. Pass the same tag on every rank")
        if dist.get_rank() == 0:
            logger.warning(f"{message}. {tags[0]!r} is used")
    return tags[0]
