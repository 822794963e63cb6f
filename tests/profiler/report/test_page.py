"""The page of a job, from the files that monitors and loops write."""

from __future__ import annotations

import json
import re

import pytest
from tests.profiler.browser import dom, needs_chromium

from ds_profiler.report import page, read_run, write_report
from ds_profiler.report.page import charts_of


def log(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def job(folder):
    rows = [
        {
            "step": i,
            "loss": 5 / i,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_s": 900.0 + i,
            "memory_bytes": i << 20,
        }
        for i in range(1, 41)
    ]
    rows[19]["validation"] = 0.3
    log(folder, rows)
    record = {
        "title": "A <b> run",
        "starts": ["2026-11-30T10:00:00+00:00", "2026-11-30T11:00:00+00:00"],
        "facts": {"model": "GPT, 10,800,000 parameters"},
        "configuration": {"train_batch_size": 8},
        "levels": {"bigram": 2.5},
        "texts": {"Sample": "x < y"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_everything_that_is_known_stands_on_the_page(tmp_path):
    text = write_report(job(tmp_path)).read_text()
    assert re.findall(r"<figcaption>([^<]*)<", text) == [
        "Loss",
        "Learning rate",
        "Gradient norm before clipping",
        "Throughput, all ranks",
        "Memory of rank 0",
    ]
    assert re.findall(r"</i>([^<]*)</span>", text) == ["train", "validation", "bigram 2.5"]
    for part in (
        "A &lt;b&gt; run",
        "10,800,000 parameters",
        "train_batch_size",
        "x &lt; y",
        "continued",
        "0.125 at step 40",
    ):
        assert part in text
    assert not re.findall(r"https?://|src=|href=", text)


def test_curves_of_the_csv_monitor(tmp_path):
    names = (
        "Train_Samples_train_loss",
        "Train_Samples_loss_scale",
        "Eval_loss",
        "Eval_accuracy",
        "Train_Samples_elapsed_time_ms_step",
    )
    for name in names:
        (tmp_path / f"{name}.csv").write_text(f"step,{name}\n8,1.0\n16,1.0\n")
    run = read_run(tmp_path)
    assert run.x_label == "samples" and run.curves["Eval_loss"] == ((8.0, 1.0), (16.0, 1.0))
    charts = {chart.title: [line.name for line in chart.lines] for chart in charts_of(run)}
    assert charts == {"Loss": ["train", "Eval"], "Time of the parts of a step": [""], "Eval_accuracy": [""]}
    (tmp_path / "Train_Samples_loss_scale.csv").write_text("step,x\n8,65536\n16,32768\n")
    assert "Loss scale" in [chart.title for chart in charts_of(read_run(tmp_path))]


def test_what_a_killed_job_wrote_after_its_checkpoint_does_not_count(tmp_path):
    (tmp_path / "a.csv").write_text("step,a\n1,10\n2,20\n3,30\n4,40\n3,31\n4,41\n5,51\n6,")
    assert read_run(tmp_path).curves["a"] == ((1, 10), (2, 20), (3, 31), (4, 41), (5, 51))
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_run(tmp_path).curves == {"loss": ((1.0, 2.0),)}


def test_folders_without_curves_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="turn on csv_monitor"):
        read_run(tmp_path)
    job(tmp_path / "first")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "first"))):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        read_run(tmp_path / "second")
    log(tmp_path / "third", [])
    with pytest.raises(ValueError, match="has not finished a step"):
        read_run(tmp_path / "third")
    (tmp_path / "first" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        read_run(tmp_path / "first")
    log(tmp_path / "fourth", [{"loss": 1}])
    with pytest.raises(ValueError, match='line 1: every line is a JSON object with the number "step"'):
        read_run(tmp_path / "fourth")


@needs_chromium
def test_a_browser_draws_it_on_a_phone(tmp_path):
    file = write_report(job(tmp_path))
    probe = """<script>addEventListener("load", () => {
      const svg = document.querySelector("figure.chart svg"), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width * .55, clientY: box.top + 60}));
      document.body.dataset.wide = document.documentElement.scrollWidth - innerWidth;
      document.body.dataset.tip = tip.textContent.replaceAll("\\n", "|");
    });</script></body>"""
    file.write_text(file.read_text().replace("</body>", probe))
    shown = dom(file, width=500)  # Chromium's narrowest window
    assert 'data-ready="5"' in shown
    assert int(re.search(r'data-wide="(-?\d+)"', shown).group(1)) <= 0
    assert re.search(r'data-tip="step \d+\|train: [\d.]+', shown)


def test_page_needs_no_record():
    from ds_profiler.report import Run

    assert "<svg" in page(Run(title="t", x_label="step", curves={"loss": ((1, 2.0), (2, 1.0))}))
