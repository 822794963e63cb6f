"""Drawings contain every action, at its time."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
import zlib

import pytest

from ds_pipe import make, simulate
from ds_pipe.draw import html, png, svg


@pytest.fixture
def run():
    return simulate(make("zb-v", 4, 8))


def test_svg_has_one_rectangle_for_each_action_at_its_time(run):
    tree = ET.fromstring(svg(run.spans, unit="units"))
    name = "{http://www.w3.org/2000/svg}"
    boxes = {g.find(f"{name}title").text: g.find(f"{name}rect") for g in tree.iter(f"{name}g")}
    assert len(boxes) == len(run.spans)
    span = run.spans[5]
    box = boxes[f"{span.action} on rank 0, step 0: {span.start:g} to {span.end:g} units"]
    scale = (1200 - 60) / run.total_s
    assert float(box.get("x")) == pytest.approx(56 + span.start * scale, abs=0.01)
    assert float(box.get("width")) == pytest.approx((span.end - span.start) * scale, abs=0.01)


def test_png_is_one_and_its_bubbles_are_grey(run):
    data = png(run.spans, width=510)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (510, 4 * 28 + 6)
    start = data.index(b"IDAT") + 4
    size = struct.unpack(">I", data[start - 8 : start - 4])[0]
    assert (
        zlib.crc32(data[start - 4 : start + size])
        == struct.unpack(">I", data[start + size : start + size + 4])[0]
    )
    rows = zlib.decompress(data[start : start + size])
    last_rank = rows[(6 + 3 * 28 + 5) * (3 * 510 + 1) :][1 : 1 + 3 * 510]
    # The last rank waits for three of 51 units.
    assert last_rank[: 3 * 30] == bytes([242]) * 90
    assert last_rank[3 * 31 : 3 * 32] != bytes([242] * 3)


def test_html_escapes_and_lists_the_facts(run):
    page = html(run.spans, title="<zb>", facts={"bubble": "5.9%"})
    assert (
        "<h1>&lt;zb&gt;</h1>" in page
        and "<td>5.9%</td>" in page
        and page.count("<title>") == 1 + len(run.spans)
    )
