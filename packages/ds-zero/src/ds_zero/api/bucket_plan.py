"""Computes the layouts of the buckets from a model's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ds_zero.comm.topology import Topology
from ds_zero.config import ZeroConfig
from ds_zero.layout.buckets import (
    FROZEN,
    BucketLayout,
    ParamInfo,
    default_bucket_numel,
    default_persistence_numel,
    keep_small_whole,
    plan_buckets,
)
from ds_zero.runtime.materialize import compute_dtype


def plan_layouts(
    groups: Sequence[Sequence[nn.Parameter]],
    params: Mapping[str, nn.Parameter],
    stage: int,
    config: ZeroConfig,
    topology: Topology,
    undivided: Sequence[bool],
    unit_of: Mapping[str, str],
    rows: frozenset[int],
) -> tuple[BucketLayout, ...]:
    """Divides the parameters into buckets. Parameters outside of `groups` are sharded only at stage 3.

    Args:
        groups: the parameters of each group of the optimizer.
        undivided: for each group, whether its tensors stay whole on one rank.
        unit_of: name of a parameter -> the unit that gathers it; empty below stage 3.
        rows: identities of parameters whose gradients are sent by rows; empty without `sparse_gradients`.
    """
    group_of = {id(p): g for g, group in enumerate(groups) for p in group}
    infos = []
    for fqn, p in params.items():
        group = group_of.get(id(p), FROZEN)
        infos.append(
            ParamInfo(
                fqn=fqn,
                shape=tuple(p.shape),
                dtype=str(compute_dtype(fqn, p, config)),
                group=group,
                unit=unit_of.get(fqn),
                undivided=group != FROZEN and undivided[group],
                axis=topology.axis_of.get(fqn, 0),
                by_rows=group != FROZEN and id(p) in rows,
                run=topology.stacked.get(fqn, (0, 1)),
            )
        )
    if stage == 3:
        threshold = config.persistence_threshold_numel
        infos = keep_small_whole(
            infos,
            default_persistence_numel(infos) if threshold is None else threshold,
            config.model_persistence_numel,
        )
    bucket_numel = config.reduce_bucket_numel or default_bucket_numel(sum(p.numel for p in infos))
    counts = [ranks.size for ranks in topology.axes]
    return plan_buckets(infos, num_ranks=counts, owners=stage > 0, bucket_numel=bucket_numel)
