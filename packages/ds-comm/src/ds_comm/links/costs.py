"""Time of exact and of compressed collectives on measured links, as pure functions.

[Note: cost of an exchange]
All collectives here send a piece to each other rank directly: to the ranks of the same machine over one link, and to
those of the others over another link. A rank's rate is measured while all ranks send, so

    seconds = sum over links of (latency + bytes sent over it / rate) + bytes encoded / rate + bytes decoded / rate

The last two are counted in bytes of fp32, and are zero for exact collectives. What is equal on both sides (sums, the
optimizer) is left out, and so is overlap with computation: a compressed collective that loses here can't gain by being
hidden, since encoding takes the processor from the computation.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.integer import IntCompressor
from ds_comm.compress.interfaces import Compressor
from ds_comm.compress.sign import SignCompressor


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link as one rank sees it while all ranks use it."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """Duration of an exchange in which a rank sends `num_bytes`; none takes no time."""
        return self.latency_s + num_bytes / self.bytes_per_s if num_bytes else 0.0


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Rates of a compressor on one rank, in bytes of fp32 per second."""

    encode_bytes_per_s: float
    decode_bytes_per_s: float

    def seconds(self, encoded: float, decoded: float) -> float:
        """Duration of encoding and decoding so many elements."""
        return 4 * encoded / self.encode_bytes_per_s + 4 * decoded / self.decode_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Links:
    """What was measured."""

    within_host: Link | None = None
    """Messages between ranks of one machine; None: there is one rank on each."""
    between_hosts: Link | None = None
    """Messages between machines; None: there is one."""
    shared_memory: Link | None = None
    """Exact tensors between ranks of one machine, where they send no messages; None: they send messages."""
    codecs: dict[str, Codec]
    """Compressor ("sign", "int8", "int4") -> its rates."""

    def exact_s(self, local: float, remote: float) -> float:
        """Duration of an exchange of exact tensors: bytes sent within the machine, and to other machines."""
        return _seconds(self.shared_memory or self.within_host, local) + _seconds(self.between_hosts, remote)

    def messages_s(self, local: float, remote: float) -> float:
        """The same of payloads of a compressor, which are always messages."""
        return _seconds(self.within_host, local) + _seconds(self.between_hosts, remote)


def _seconds(link: Link | None, num_bytes: float) -> float:
    if link is None and num_bytes:
        raise ValueError(
            "the link over which these ranks exchange tensors was not measured: run `ds comm bench --out FILE` on as "
            "many machines as the job"
        )
    return link.seconds(num_bytes) if link is not None else 0.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One exchange, exact and compressed."""

    what: str
    exact_s: float
    compressed_s: float
    exact_bytes: float
    """Sent by each rank."""
    compressed_bytes: float

    @property
    def loses(self) -> bool:
        """Whether compression takes longer."""
        return self.compressed_s > self.exact_s

    def __str__(self) -> str:
        return (
            f"{self.what}: {1e3 * self.compressed_s:.3g} ms compressed ({_mb(self.compressed_bytes)} sent by a rank), "
            f"{1e3 * self.exact_s:.3g} ms exact ({_mb(self.exact_bytes)})"
        )


def gather(numel: int, itemsize: int, local: int, hosts: int, links: Links) -> Comparison:
    """Compares all-gathers of parameters: exact, and as int8 (qwZ).

    Args:
        numel: number of elements of all ranks together.
        itemsize: bytes of an exact element.
        local: ranks on each machine.
        hosts: number of machines.
    """
    each = -(-numel // (local * hosts))
    exact, coded = each * itemsize, _payload(IntCompressor(bits=8), each)
    near, far = local - 1, local * hosts - local
    codec = links.codecs["int8"].seconds(each, numel - each)
    return Comparison(
        what="all-gather of the parameters (zero_quantized_weights)",
        exact_s=links.exact_s(near * exact, far * exact),
        compressed_s=links.messages_s(near * coded, far * coded) + codec,
        exact_bytes=(near + far) * exact,
        compressed_bytes=(near + far) * coded,
    )


def reduce(numel: int, itemsize: int, local: int, hosts: int, links: Links) -> Comparison:
    """Compares reduce-scatters of gradients: exact, and as int4 (qgZ), in two hops if there are several machines with
    several ranks. Arguments as for `gather`.
    """
    each = -(-numel // (local * hosts))
    exact, coded = each * itemsize, _payload(IntCompressor(bits=4), each)
    near, far = local - 1, local * hosts - local
    if local > 1 and hosts > 1:
        sent = near * hosts * coded, (hosts - 1) * coded
        codec = links.codecs["int4"].seconds(numel + each * hosts, numel + each * hosts)
    else:
        sent = near * coded, far * coded
        codec = links.codecs["int4"].seconds(numel, numel)
    return Comparison(
        what="reduce-scatter of the gradients (zero_quantized_gradients)",
        exact_s=links.exact_s(near * exact, far * exact),
        compressed_s=links.messages_s(*sent) + codec,
        exact_bytes=(near + far) * exact,
        compressed_bytes=sum(sent),
    )


def one_bit(numel: int, itemsize: int, local: int, hosts: int, links: Links) -> Comparison:
    """Compares all-reduces of gradients: exact, and in two phases of one bit an element. Arguments as for `gather`."""
    ranks = local * hosts
    each = -(-numel // ranks)
    exact, coded = 2 * each * itemsize, 2 * _payload(SignCompressor(), each)
    near, far = local - 1, ranks - local
    return Comparison(
        what="all-reduce of the gradients (the 1-bit optimizer)",
        exact_s=links.exact_s(near * exact, far * exact),
        compressed_s=links.messages_s(near * coded, far * coded)
        + links.codecs["sign"].seconds(numel + each, 2 * numel),
        exact_bytes=(near + far) * exact,
        compressed_bytes=(near + far) * coded,
    )


def _payload(compressor: Compressor, numel: int) -> int:
    return compressor.payload_bytes(Blocks.uniform(numel, compressor.block_numel)) if numel else 0


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.3g} MB"
