"""Tags that ranks give differently, by `checkpoint.tag_validation`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

import deepspeed
from compat.zero.test_construction import CONFIG, net
from harness import ranks


@ranks(2)
@pytest.mark.parametrize("mode", ["FAIL", "warn", "Ignore"])
def test_different_tags(mode: str, tmp_path: Path) -> None:
    engine, *_ = deepspeed.initialize(model=net(), config={**CONFIG, "checkpoint": {"tag_validation": mode}})
    tag = f"tag-{dist.get_rank()}"
    if mode == "FAIL":
        with pytest.raises(AssertionError, match="rank 0 'tag-0', rank 1 'tag-1'"):
            engine.save_checkpoint(tmp_path, tag=tag)
        assert not list(tmp_path.iterdir())
    else:
        engine.save_checkpoint(tmp_path, tag=tag)
        assert (tmp_path / "latest").read_text() == "tag-0" and not (tmp_path / "tag-1").exists()
    engine.destroy()
