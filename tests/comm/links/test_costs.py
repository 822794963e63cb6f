"""Whether compression gains time, from rates: exact figures of hand-made links."""

from __future__ import annotations

import pytest

from ds_comm.links import Codec, Link, Links, gather, one_bit, reduce

CODEC = Codec(encode_bytes_per_s=4e9, decode_bytes_per_s=4e9)  # 1 ns an element
CODECS = {"sign": CODEC, "int8": CODEC, "int4": CODEC}
SLOW = Link(latency_s=1e-3, bytes_per_s=1e8)
FAST = Link(latency_s=0.0, bytes_per_s=1e12)
NUMEL = 1 << 22


def test_on_a_slow_link_compression_gains_and_on_shared_memory_it_loses() -> None:
    slow = Links(between_hosts=SLOW, codecs=CODECS)
    near = Links(within_host=SLOW, shared_memory=FAST, codecs=CODECS)
    for compare, factor in ((gather, 3.0), (reduce, 4.0), (one_bit, 8.0)):
        far = compare(NUMEL, 4, 1, 2, slow)
        assert not far.loses
        assert far.exact_s / far.compressed_s > factor
        assert compare(NUMEL, 4, 2, 1, near).loses


def test_the_durations_are_those_of_the_formula() -> None:
    one = gather(NUMEL, 4, 1, 2, Links(between_hosts=SLOW, codecs=CODECS))
    half = NUMEL // 2
    assert one.exact_bytes == 4 * half
    assert one.exact_s == pytest.approx(1e-3 + 4 * half / 1e8)
    assert one.compressed_s == pytest.approx(1e-3 + one.compressed_bytes / 1e8 + (half + half) * 1e-9)
    assert half < one.compressed_bytes < 1.05 * half  # and a scale for each block


def test_two_hops_send_less_between_hosts_than_one() -> None:
    links = Links(within_host=FAST, between_hosts=Link(latency_s=0.0, bytes_per_s=1e8), codecs=CODECS)
    hops = reduce(NUMEL, 4, 4, 2, links)
    flat = reduce(NUMEL, 4, 1, 8, links)
    assert hops.compressed_s < 0.6 * flat.compressed_s
    assert hops.exact_s == pytest.approx(
        4 * (NUMEL // 8 * 4) / 1e8, rel=0.01
    )  # pieces of the 4 ranks over there


def test_a_link_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="was not measured: run `ds comm bench --out FILE`"):
        gather(NUMEL, 4, 1, 2, Links(within_host=FAST, codecs=CODECS))
