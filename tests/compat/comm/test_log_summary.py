"""`deepspeed.comm.log_summary`, with an engine and without."""

from __future__ import annotations

import deepspeed.comm
import torch
import torch.distributed as dist

from compat.engine.test_engine import batch, make
from ds_compat.comm import collectives
from harness import ranks


@ranks(2)
def test_training_and_own_calls_are_recorded_under_the_peers_names() -> None:
    collectives._log.clear()
    assert deepspeed.comm.log_summary(return_dict=True) == {}
    engine = make(2, comms_logger={"enabled": True})
    engine.backward(engine(*batch(0, dist.get_rank())))
    engine.step()
    deepspeed.comm.all_reduce(torch.ones(100), prof=True)
    told = deepspeed.comm.log_summary(show_straggler=True, return_dict=True)
    engine.destroy()
    collectives._log.clear()
    assert told["metadata"]["world_size"] == 2
    assert told["summary"]["all_reduce"][400]["count"] == 1
    assert {"count", "total_latency_ms", "avg_latency_ms", "tput_avg_gbps", "busbw_avg_gbps"} <= set(
        told["summary"]["all_reduce"][400]
    )
    assert "reduce_scatter" in told["summary"] and "all_gather" in told["summary"]
    assert told["straggler_analysis"]["all_reduce"][400]["total_straggler_ms"] >= 0


@ranks(1)
def test_configure_records_without_an_engine() -> None:
    collectives._log.clear()
    deepspeed.comm.configure(enabled=True, prof_all=True)
    deepspeed.comm.broadcast(torch.ones(10), 0)
    told = deepspeed.comm.log_summary(return_dict=True)
    collectives._log[0].close()
    collectives._log.clear()
    assert told["summary"]["broadcast"][40]["count"] == 1
