"""The section `links`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import NotNegative, Section, Size


class LinkConfig(Section):
    """One link, as one rank sees it while all ranks use it."""

    latency_us: NotNegative = Field(
        default=0.0, description="Duration of the smallest exchange, in microseconds."
    )
    rate: Size = Field(description="Bytes per second that a rank sends.")


class CodecConfig(Section):
    """A compressor on one rank, in bytes of fp32 per second."""

    encode: Size = Field(description="Rate of encoding, in bytes of fp32 per second.")
    decode: Size = Field(description="Rate of decoding, in bytes of fp32 per second.")


class CodecsConfig(Section):
    """The compressors of quantised ZeRO and of the 1-bit optimizers."""

    sign: CodecConfig | None = Field(
        default=None, description="Of one bit an element. Default: not measured."
    )
    int8: CodecConfig | None = Field(default=None, description="Of 8 bits an element. Default: not measured.")
    int4: CodecConfig | None = Field(default=None, description="Of 4 bits an element. Default: not measured.")


class LinksConfig(Section):
    """Measured links between ranks, as `ds comm bench --out` writes them. With them the engine checks whether what
    compresses messages gains time.
    """

    within_host: LinkConfig | None = Field(
        default=None,
        description="Messages between ranks of one machine. Default: one rank on each machine.",
    )
    between_hosts: LinkConfig | None = Field(
        default=None, description="Messages between machines. Default: one machine."
    )
    shared_memory: LinkConfig | None = Field(
        default=None,
        description="Exact tensors between ranks of one machine that send no messages. Default: they send messages.",
    )
    codecs: CodecsConfig = Field(default_factory=CodecsConfig, description="Rates of the compressors.")
    if_slower: Literal["warn", "refuse", "ignore"] = Field(
        default="warn",
        description="What the engine does if compressed messages would take longer than exact ones on these links.",
    )
