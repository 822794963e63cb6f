"""The same scripts and configurations under DeepSpeed and under ds-compat: do they train the same?

    ci/bench compat [--jobs plain,accelerated,trainer] [--models gpt2,llama,t5] [--precisions fp32,bf16]
                    [--stages 0,1,2,3] [--accumulations 1,4] [--steps 20] [--fresh] [--no-checkpoints]

Every job in tests/compat/jobs runs on two processes, once with the interpreter of .venv-peer (DeepSpeed, Accelerate,
Transformers) and once with that of .venv (ours, the same Accelerate and Transformers): the only thing that differs is
which package answers `import deepspeed`. Compared are the losses of rank 0 at every micro-batch.

fp32: at most 1e-5 relative. bf16, with data_types.grad_accum_dtype fp32: at most twice the largest deviation between
the peer's own stages, in the same job, model and accumulation of the same run.

Checkpoints: DeepSpeed writes one at stages 1, 2 and 3 on two processes and trains on; ours loads it on one, two and
three processes and trains on, within the same bounds; and what its own zero_to_fp32 and ours make of it is compared bit
by bit.

What the peer says is kept in build/bench-compat by a hash of scripts, options and versions, so that a second run only
runs ours; --fresh forgets it. Losses do not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
JOBS = ROOT / "tests" / "compat" / "jobs"
GOLDEN = ROOT / "tests" / "golden" / "deepspeed"
KEPT = ROOT / "build" / "bench-compat"
EXTENSIONS = ROOT / "build" / "bench-compat-extensions"
"""What DeepSpeed compiles at the first use."""
COMPILE = (
    "from deepspeed.ops.op_builder import FusedAdamBuilder; from deepspeed.ops.op_builder.cpu import "
    "ShareMemCommBuilder; FusedAdamBuilder().load(); ShareMemCommBuilder().load()"
)
FP32_LIMIT = 1e-5
RANKS = 2
VERSIONS = (
    "import importlib.metadata as m; print(*(m.version(n) for n in "
    "('torch', 'deepspeed', 'transformers', 'accelerate', 'numpy')))"
)


@dataclass(frozen=True)
class Cell:
    """One run of a script."""

    job: str
    model: str
    precision: str
    accumulation: int
    stage: int
    steps: int

    @property
    def options(self) -> list[str]:
        words = [f"--model={self.model}", f"--stage={self.stage}", f"--accumulation={self.accumulation}"]
        return [*words, f"--steps={self.steps}", *(["--bf16"] if self.precision == "bf16" else [])]


@dataclass
class Side:
    """One of the two environments."""

    python: str
    timeout_s: float
    folder: Path
    kept: Path | None = None
    """Where answers are looked up and left; None: neither."""
    seconds: float = 0.0
    errors: dict[Cell, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        path = f"{Path(self.python).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed looks for ninja
        # Of its own: a compilation that somebody killed elsewhere leaves a lock, at which DeepSpeed waits for ever.
        return {**os.environ, **settings, "PATH": path, "TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}

    def losses(self, cells: Sequence[Cell]) -> dict[Cell, list[float]]:
        """Of every cell that ran; the others are in `errors`. One start of Python for each job."""
        found: dict[Cell, list[float]] = {}
        missing: list[Cell] = []
        for cell in cells:
            name = self._name(cell)
            if name is not None and name.is_file():
                found[cell] = json.loads(name.read_text())
            else:
                missing.append(cell)
        for job in dict.fromkeys(cell.job for cell in missing):
            found |= self._run(job, [cell for cell in missing if cell.job == job])
        return found

    def _run(self, job: str, cells: Sequence[Cell]) -> dict[Cell, list[float]]:
        start = time.perf_counter()
        cases = [{"options": c.options, "out": str(self.folder / f"{i}.json")} for i, c in enumerate(cells)]
        listed = self.folder / "cases.json"
        listed.write_text(json.dumps(cases))
        command = [self.python, str(JOBS / "several.py"), job, str(listed), str(RANKS), str(self.timeout_s)]
        found: dict[Cell, list[float]] = {}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self.environment()) as process:
            assert process.stdout is not None
            # A line for each case, so that what is done is kept where the rest is interrupted.
            for cell, case, _ in zip(cells, cases, filter(_is_report, process.stdout), strict=False):
                self._take(cell, Path(case["out"]), found)
        for cell in cells:
            if cell not in found and cell not in self.errors:
                self.errors[cell] = f"exit status {process.returncode}"
        self.seconds += time.perf_counter() - start
        return found

    def _take(self, cell: Cell, out: Path, found: dict[Cell, list[float]]) -> None:
        """What one case has left."""
        log = Path(f"{out}.log")
        if out.is_file():
            written = json.loads(out.read_text())
            found[cell] = written.get("micro_losses") or written["losses"]
            name = self._name(cell)
            if name is not None:
                name.parent.mkdir(parents=True, exist_ok=True)
                name.write_text(json.dumps(found[cell]))
        elif log.is_file():
            self.errors[cell] = log.read_text(errors="replace")[-3000:]
        out.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        shutil.rmtree(out.with_suffix(""), ignore_errors=True)  # the Trainer's folder

    def _name(self, cell: Cell) -> Path | None:
        if self.kept is None:
            return None
        said = [self.python, *self._versions(), *cell.options]
        said += [(JOBS / file).read_text() for file in (f"{cell.job}.py", "common.py")]
        return self.kept / f"{cell.job}-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:20]}.json"

    def _versions(self) -> list[str]:
        if not hasattr(self, "_said"):
            self._said = subprocess.check_output([self.python, "-c", VERSIONS], text=True).split()
        return self._said


def _is_report(line: str) -> bool:
    """Not what an import prints."""
    return line.startswith('{"out"')


def compile_what_the_peer_needs(peer: Side) -> None:
    """Once, by one process, so that ranks do not wait for each other."""
    for lock in EXTENSIONS.glob("**/lock"):
        lock.unlink()
    subprocess.run(
        [peer.python, "-c", COMPILE], check=True, stdout=subprocess.DEVNULL, env=peer.environment()
    )


def deviation(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference; inf for curves of different length or with a NaN."""
    if len(ours) != len(theirs) or any(x != x for x in (*ours, *theirs)):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def grid(args: argparse.Namespace, precision: str) -> list[Cell]:
    """Stages innermost, so that what is compared among stages stands together."""
    axes = (
        filter(None, args.jobs.split(",")),
        args.models.split(","),
        map(int, args.accumulations.split(",")),
    )
    return [
        Cell(job, model, precision, accumulation, stage, args.steps)
        for job, model, accumulation in itertools.product(*axes)
        # Transformers itself refuses TrainingArguments(bf16=True) with DeepSpeed where there is no accelerator.
        if (job, precision) != ("trainer", "bf16")
        for stage in map(int, args.stages.split(","))
    ]


def compare(args: argparse.Namespace, precision: str, ours: Side, peer: Side) -> bool:
    """Prints one table; whether everything is within its limit."""
    cells = grid(args, precision)
    if not cells:
        return True
    theirs = peer.losses(cells)
    own = ours.losses(cells)
    stages = [int(s) for s in args.stages.split(",")]
    among_title = " the peer's stages among each other | ours / that |" if precision == "bf16" else ""
    print(f"\n{precision}: largest relative difference of a loss, {args.steps} steps, at stage\n")
    print(f"| job | model | accumulation | {' | '.join(map(str, stages))} |{among_title}")
    print("|" + "---|" * (3 + len(stages) + (2 if among_title else 0)))
    good = True
    for (job, model, accumulation), group in itertools.groupby(
        cells, lambda c: (c.job, c.model, c.accumulation)
    ):
        row: list[str] = [job, model, str(accumulation)]
        off: list[float] = []
        members = list(group)
        for cell in members:
            there = next((theirs[c] for c in (cell, *members) if c in theirs), None)
            if there is not None and cell in own:
                off.append(deviation(own[cell], there))
                row.append(f"{off[-1]:.1e}" + ("" if cell in theirs else " *"))
            else:
                row.append("fails there" if there is None else "fails here")
                good = False
        limit = FP32_LIMIT
        if precision == "bf16":
            all_there = [theirs[cell] for cell in members if cell in theirs]
            among = max((deviation(a, b) for a in all_there for b in all_there), default=0.0)
            limit = 2 * among
            worst = max(off, default=0.0)
            row += [f"{among:.1e}", f"{worst / among:.2f}" if among else "-"]
        good &= all(value <= limit for value in off)
        print(f"| {' | '.join(row)} |", flush=True)
    if precision == "bf16" and any(cell not in theirs for cell in cells):
        print("\n*: the peer refuses this stage; compared with the first of its stages that runs")
    for side in (ours, peer):
        for cell, said in side.errors.items():
            shown = said if side is ours else said[-400:]
            print(f"\n{'ours' if side is ours else 'the peer'}: {cell} failed:\n{shown}", file=sys.stderr)
        side.errors.clear()
    return good


# --- checkpoints


def torchrun(side: Side, ranks: int, script: Path, *words: str, cwd: Path) -> str:
    command = [side.python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(script), *words], capture_output=True, text=True, timeout=side.timeout_s * 2,
        env=side.environment(), cwd=cwd, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(
            f"{script.name} {' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout


def written_by(peer: Side, folder: Path, stage: int, precision: str) -> tuple[Path, list[float]]:
    """A new checkpoint of the peer's, and the losses with which it went on."""
    name = f"stage{stage}-{precision}"
    work = Path(tempfile.mkdtemp(dir=folder))
    for file in ("make.py", "job.py"):  # it writes beside itself
        shutil.copy(GOLDEN / file, work)
    options = json.dumps({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    torchrun(peer, RANKS, work / "make.py", name, str(stage), precision, "2", options, cwd=work)
    known = json.loads((work / name / "facts.json").read_text())
    return work / name, known["after"]


def checkpoints(args: argparse.Namespace, ours: Side, peer: Side) -> bool:
    """Prints the second table."""
    print(
        "\nCheckpoints of the peer (2 processes), gone on with here: largest relative difference of a loss\n"
    )
    print("| stage | precision | 1 process | 2 processes | 3 processes | same fp32 weights as zero_to_fp32 |")
    print("|---|---|---|---|---|---|")
    good = True
    for precision in filter(None, args.precisions.split(",")):
        made = {stage: written_by(peer, ours.folder, stage, precision) for stage in (1, 2, 3)}
        curves = [after for _, after in made.values()]
        among = max(deviation(a, b) for a in curves for b in curves)
        limit = FP32_LIMIT if precision == "fp32" else max(FP32_LIMIT, 2 * among)
        for stage, (where, after) in made.items():
            row = [str(stage), precision]
            for ranks in (1, 2, 3):
                out = where.parent / f"{ranks}.json"
                torchrun(ours, ranks, JOBS / "resumed.py", str(where), str(out), cwd=where.parent)
                off = deviation(json.loads(out.read_text()), after)
                good &= off <= limit
                row.append(f"{off:.1e}")
            same, what = exports_agree(ours, peer, where)
            good &= same
            row.append(f"{'yes' if same else 'NO'} ({what})")
            print(f"| {' | '.join(row)} |", flush=True)
        print(f"| the peer's own stages among each other | {precision} | | {among:.1e} | | |", flush=True)
    return good


CONVERT = (
    "import sys; from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as c; "
    "c(sys.argv[1], sys.argv[2], safe_serialization=sys.argv[3] == 'safetensors')"
)
SAME = """
import sys, torch
from pathlib import Path
def read(folder):
    files = sorted(Path(folder).glob("*.bin"))
    if files:
        return {k: v for f in files for k, v in torch.load(f).items()}
    from safetensors.torch import load_file
    return {k: v for f in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(f).items()}
a, b, c = map(read, sys.argv[1:])
assert a and a.keys() <= b.keys(), (sorted(a), sorted(b))
wrong = [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])]
assert set(c) <= set(b) and len({v.data_ptr() for v in b.values()}) <= len(c), (sorted(b), sorted(c))
wrong += [k for k in c if not torch.equal(b[k], c[k])]
assert not wrong, wrong
more = sorted(b.keys() - a.keys())
print(f"{len(a)} tensors" + (f"; theirs lacks {', '.join(more)}" if more else ""))
"""


def exports_agree(ours: Side, peer: Side, where: Path) -> tuple[bool, str]:
    """Whether our zero_to_fp32 (as .bin, and as safetensors) says of a checkpoint what theirs says, and of how much."""
    folders = []
    for side, layout in ((peer, "pt"), (ours, "pt"), (ours, "safetensors")):
        folders.append(str(where.parent / f"export{len(folders)}"))
        words = [side.python, "-c", CONVERT, str(where), folders[-1], layout]
        done = subprocess.run(words, capture_output=True, text=True, env=side.environment(), check=False)
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            return False, "fails"
    done = subprocess.run(
        [ours.python, "-c", SAME, *folders],
        capture_output=True,
        text=True,
        env=ours.environment(),
        check=False,
    )
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return False, "differs"
    return True, done.stdout.strip()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=str(ROOT / ".venv-peer" / "bin" / "python"))
    parser.add_argument("--ours", default=str(ROOT / ".venv" / "bin" / "python"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--jobs", default="plain,accelerated,trainer")
    parser.add_argument("--models", default="gpt2,llama,t5")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--accumulations", default="1,4")
    parser.add_argument("--timeout-s", type=float, default=300, help="of one run of a script")
    parser.add_argument("--fresh", action="store_true", help="run the peer again")
    parser.add_argument("--no-checkpoints", dest="checkpoints", action="store_false")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.fresh:
        shutil.rmtree(KEPT, ignore_errors=True)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = (
            Side(python, args.timeout_s, Path(folder), kept)
            for python, kept in ((args.ours, None), (args.peer, KEPT))
        )
        compile_what_the_peer_needs(peer)
        for precision in filter(None, args.precisions.split(",")):
            good &= compare(args, precision, ours, peer)
        print(f"\n{ours.seconds:.0f} s here, {peer.seconds:.0f} s there")
        if args.checkpoints:
            good &= checkpoints(args, ours, peer)
    print("\nwithin the limits" if good else "\nNOT within the limits")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
