"""One file for all ranks: what is in it, how large it is, and that a browser draws it."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
import zlib

import pytest
from tests.profiler.browser import dom, needs_chromium

from ds_profiler.__main__ import main
from ds_profiler.timeline import Lane, RankTimeline, Span, write, write_page
from ds_profiler.timeline.page import thinned


def recorded(rank, count=200, seed=0):
    draw = random.Random(seed * 1000 + rank)
    spans, at = [Span("ds.engine.forward", Lane.PHASE, 10**18, 10**18 + count * 10_000)], 10**18
    for index in range(count):
        at += draw.randrange(1000, 9000)
        lane = draw.choice([Lane.COMPUTE, Lane.COMMUNICATION, Lane.RANGE])
        spans.append(Span(f"{lane.value} {index % 37}", lane, at, at + draw.randrange(500, 40_000)))
    memory = tuple((10**18 + i * 10_000, draw.randrange(1 << 30)) for i in range(count))
    return RankTimeline(
        rank=rank, host=f"host-{rank // 8}", spans=tuple(spans), memory=memory, clock_error_ns=1500
    )


def data_of(text):
    packed = re.search(r'<script id="data"[^>]*>([^<]*)<', text).group(1)
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def test_the_page_holds_every_span_and_needs_nothing_else(tmp_path):
    ranks = [recorded(0), recorded(1)]
    file = tmp_path / "page.html"
    write_page(ranks, file, title="A <job>")
    text = file.read_text()
    assert "A &lt;job&gt;" in text
    assert "@@" not in text
    assert not re.findall(r"https?://|src=|href=", text)
    assert "2 ranks on 1 host" in text
    assert "1.50 us" in text
    data = data_of(text)
    drawn = data["ranks"][1]
    starts, at = [], 0
    for i in range(0, len(drawn["spans"]), 4):
        at += drawn["spans"][i + 2]
        starts.append((data["lanes"][drawn["spans"][i]], drawn["names"][drawn["spans"][i + 1]], at))
    begin = min(s.start_ns for r in ranks for s in r.spans)
    assert starts == [(s.lane.value, s.name, (s.start_ns - begin) // 1000) for s in ranks[1].spans]


def test_64_ranks_are_below_5_megabytes_and_what_is_left_out_is_said(tmp_path):
    ranks = [recorded(rank, count=7000) for rank in range(64)]
    file = tmp_path / "page.html"
    write_page(ranks, file)
    assert file.stat().st_size < 5e6
    text = file.read_text()
    assert "64 ranks on 8 hosts" in text
    assert f"The {64 * 1001} shortest spans are not drawn" in text
    kept = data_of(text)["ranks"][5]
    longest = sorted((s.duration_ns // 1000 for s in ranks[5].spans), reverse=True)[:3000]
    assert sorted(kept["spans"][3::4], reverse=True)[:3000] == longest


def test_thinned_curves_keep_their_peaks():
    points = [(i, i % 100) for i in range(10_000)]
    points[4321] = (4321, 5000)
    few = thinned(points, 50)
    assert len(few) <= 52
    assert (4321, 5000) in few
    assert few[-1] == points[-1]
    assert thinned(points[:10], 50) == points[:10]


def test_the_command_reads_a_folder(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "record some steps" in capsys.readouterr().err
    for rank in (1, 0):
        write(recorded(rank), tmp_path)
    assert main([str(tmp_path), "--title", "mine"]) == 0
    assert "<title>mine</title>" in (tmp_path / "timeline.html").read_text()
    trace = tmp_path / "all.json.gz"
    assert main([str(tmp_path), "--out", str(trace)]) == 0
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {e["pid"] for e in events} == {0, 1}
    assert sum(e["ph"] == "X" for e in events) == 2 * 201
    (tmp_path / "rank00001.json.gz").write_bytes(b"broken")
    assert main([str(tmp_path)]) == 2
    assert "rank00001.json.gz is not a recording" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nothing was recorded"):
        write_page([RankTimeline(rank=0, host="h", spans=())], tmp_path / "x.html")


@needs_chromium
def test_a_browser_draws_it(tmp_path):
    file = tmp_path / "page.html"
    write_page([recorded(0), recorded(1)], file)
    shown = dom(file)
    rows = int(re.search(r'data-ready="(\d+)"', shown).group(1))
    assert rows >= 2 * 4  # lanes and memory of each rank
    assert re.search(r'id="range">0 us to [\d.]+ \w+ of', shown)
    assert "memory, up to" in shown
