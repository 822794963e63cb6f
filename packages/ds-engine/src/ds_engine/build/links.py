"""Checks on measured links whether what compresses messages gains time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from ds_comm.links import Codec, Comparison, Link, Links, gather, one_bit, reduce
from ds_engine.build import self_reducing
from ds_engine.config import ConfigError
from ds_engine.config.sections.communication.links import LinkConfig, LinksConfig
from ds_engine.interfaces import World
from ds_engine.job import Job
from ds_engine.job.precision import DTYPES

_ONE_BIT = ("OneBitAdam", "ZeroOneAdam", "OneBitLamb", "ShardedOneBitAdam", "ShardedOneBitLamb")


def check_links(job: Job, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Warns or raises, as `links.if_slower` says, if compressed messages would take longer than exact ones.

    Raises:
        ConfigError: names each exchange with both durations; or a link or a compressor that was not measured.
    """
    section = job.settings.links
    if section is None or section.if_slower == "ignore" or world.world_size == 1:
        return
    try:
        slower = [str(one) for one in comparisons(job, model, optimizer, world) if one.loses]
    except ValueError as error:
        raise ConfigError([f"links: {error}"]) from None
    if not slower:
        return
    remedy = 'send exact values on these links, or set links.if_slower to "ignore" if fewer bytes matter more than time'
    text = [
        f"compressed messages are slower than exact ones on the links of this job. {line}" for line in slower
    ]
    if section.if_slower == "refuse":
        raise ConfigError([f"{line}: {remedy}" for line in text])
    if world.rank == 0:
        for line in text:
            warnings.warn(f"{line}: {remedy}", stacklevel=4)


def comparisons(job: Job, model: nn.Module, optimizer: Optimizer, world: World) -> Sequence[Comparison]:
    """Returns each exchange of a step that the job compresses, exact and compressed, for all parameters at once.

    Raises:
        ValueError: a link or a compressor that is needed was not measured.
    """
    assert job.settings.links is not None
    local = world.local_size if world.world_size % world.local_size == 0 else 1
    hosts = world.world_size // local
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    cast = job.precision.param_dtype
    compute = (
        max((p.element_size() for p in model.parameters()), default=4) if cast is None else cast.itemsize
    )
    wire = job.settings.communication_data_type
    sent = compute if wire is None else DTYPES[wire].itemsize
    made = []
    if job.quantized_weights:
        made.append(gather(every, compute, local, hosts, _links(job.settings.links, "int8")))
    if job.quantized_gradients:
        made.append(reduce(trained, sent, local, hosts, _links(job.settings.links, "int4")))
    if self_reducing.reduces(optimizer) and type(optimizer).__name__ in _ONE_BIT:
        made.append(one_bit(trained, 4, local, hosts, _links(job.settings.links, "sign")))
    return made


def _links(section: LinksConfig, compressor: str) -> Links:
    codec = getattr(section.codecs, compressor)
    if codec is None:
        raise ValueError(f"codecs.{compressor} was not measured: run `ds comm bench --out FILE`")
    return Links(
        within_host=_link(section.within_host),
        between_hosts=_link(section.between_hosts),
        shared_memory=_link(section.shared_memory),
        codecs={compressor: Codec(encode_bytes_per_s=codec.encode, decode_bytes_per_s=codec.decode)},
    )


def _link(section: LinkConfig | None) -> Link | None:
    return None if section is None else Link(latency_s=1e-6 * section.latency_us, bytes_per_s=section.rate)
