"""What starting costs: nothing is imported, compiled or run that is not needed."""

from __future__ import annotations

import subprocess
import sys
import textwrap

HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "sympy",
)


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_free() -> None:
    out = run(
        """
        import sys
        import ds_engine
        print(*sorted(m for m in ("torch", "numpy", "pydantic", "rich", "typer", "safetensors") if m in sys.modules))
        """
    )
    assert out.strip() == ""


def test_config_needs_no_torch() -> None:
    out = run(
        "import sys, ds_engine; ds_engine.config.load({'train_batch_size': 1}); print('torch' in sys.modules)"
    )
    assert out.strip() == "False"


def test_a_job_with_our_own_optimizer_imports_nothing_heavy_and_starts_no_process(tmp_path: object) -> None:
    """Initialize, train, clip, schedule, save and load, with and without host offload, at stages 0 and 3."""
    out = run(
        f"""
        import sys
        import torch
        before = set(sys.modules)
        started = []
        watched = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system")
        sys.addaudithook(lambda event, args: started.append(event) if event in watched else None)
        import ds_engine
        for stage in (0, 3):
            for device in ("none", "cpu"):
                torch.manual_seed(0)
                model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
                engine, *_ = ds_engine.initialize(model=model, config={{
                    "train_batch_size": 4,
                    "optimizer": {{"type": "AdamW", "params": {{"lr": 0.1}}}},
                    "scheduler": {{"type": "WarmupLR", "params": {{"warmup_num_steps": 2}}}},
                    "zero_optimization": {{"stage": stage, "offload_optimizer": {{"device": device}}}},
                    "bf16": {{"enabled": True}},
                }})
                for _ in range(3):
                    engine.backward(engine(torch.ones(4, 4)).float().square().mean())
                    engine.step()
                engine.save_checkpoint({str(tmp_path)!r})
                engine.load_checkpoint({str(tmp_path)!r})
        heavy = [m for m in {HEAVY!r} if m in sys.modules and m not in before]
        print(heavy, started)
        """
    )
    assert out.strip() == "[] []"


def test_fork_is_watched() -> None:
    """The audit hook of the test above does see what it is there for."""
    out = run(
        """
        import sys
        started = []
        watched = ("subprocess.Popen",)
        sys.addaudithook(lambda event, args: started.append(event) if event in watched else None)
        import subprocess
        subprocess.run(["true"], check=True)
        print(started)
        """
    )
    assert out.strip() == "['subprocess.Popen']"
