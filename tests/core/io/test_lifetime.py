"""What happens to operations, tensors and threads when objects, processes and limits end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from core.io.faults import fault
from ds_core import arena
from ds_core.io import Engine

Inject = Callable[..., None]


def run(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        **options,  # type: ignore[call-overload]
    )


def test_tensors_live_until_their_operation_is_done(backend: str, tmp_path: Path, inject: Inject) -> None:
    with Engine(backend=backend) as engine:  # type: ignore[arg-type]
        file = engine.open(tmp_path / "data", create=True)
        inject(fault("write", hold=True, times=-1))
        tensor = torch.full((1000,), 7, dtype=torch.uint8)
        tensor_ref = weakref.ref(tensor)
        file.write(tensor)  # nobody keeps the Work
        del tensor
        gc.collect()
        assert tensor_ref() is not None
        inject()
        file.close()
        engine._native.release_done()
        assert tensor_ref() is None
    assert (tmp_path / "data").read_bytes() == bytes([7]) * 1000


def test_a_wait_lets_the_tensor_go(engine: Engine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "data", create=True)
    tensor = torch.ones(1000)
    tensor_ref = weakref.ref(tensor)
    work = file.write(tensor)
    del tensor
    work.wait()
    assert tensor_ref() is None


def test_an_engine_that_nobody_closes_finishes_its_writes(backend: str, tmp_path: Path) -> None:
    engine = Engine(backend=backend, block_bytes=4096)  # type: ignore[arg-type]
    file = engine.open(tmp_path / "data", create=True)
    data = torch.randint(0, 256, (300_000,), dtype=torch.uint8)
    file.write(data)
    del engine, file
    gc.collect()
    assert (tmp_path / "data").read_bytes() == data.numpy().tobytes()


def test_the_exit_of_the_interpreter_finishes_writes(backend: str, tmp_path: Path) -> None:
    code = """
        import sys, torch
        from ds_core.io import Engine
        engine = Engine(backend=sys.argv[1], block_bytes=4096)
        engine.open(sys.argv[2], create=True).write(torch.full((3_000_000,), 5, dtype=torch.uint8))
    """
    done = run(code, backend, str(tmp_path / "data"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data").read_bytes() == bytes([5]) * 3_000_000


def test_a_forked_child_gets_an_error_and_can_make_an_engine(backend: str, tmp_path: Path) -> None:
    code = """
        import os, sys, torch
        from ds_core.io import Engine
        engine = Engine(backend=sys.argv[1])
        file = engine.open(sys.argv[2], create=True)
        data = torch.ones(1000)
        file.write(data).wait()
        child = os.fork()
        if child == 0:
            try:
                file.write(data)
            except RuntimeError as error:
                print(error, flush=True)
            with Engine(backend=sys.argv[1]) as own, own.open(sys.argv[2]) as again:
                out = torch.zeros(1000)
                again.read(out).wait()
                print(torch.equal(out, data), flush=True)
            file.close()
            engine.close()
            del engine, file
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        out = torch.zeros(1000)
        file.read(out).wait()
        print(torch.equal(out, data))
    """
    done = run(code, backend, str(tmp_path / "data"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "do not exist in the forked process" in lines[0]
    assert lines[1:] == ["True", "0", "True"]


def test_many_threads_share_an_engine(backend: str, tmp_path: Path) -> None:
    with Engine(backend=backend, block_bytes=4096, queue_depth=8) as engine:  # type: ignore[arg-type]
        file = engine.open(tmp_path / "data", create=True)

        def fill(k: int) -> bool:
            part = torch.full((9_999,), k, dtype=torch.uint8)
            out = torch.empty_like(part)
            for _ in range(10):
                file.write(part, 9_999 * k).wait()
                file.read(out, 9_999 * k).wait()
                if not torch.equal(part, out):
                    return False
            return True

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(fill, range(6)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without CAP_IPC_LOCK")
def test_a_low_limit_of_locked_memory(tmp_path: Path) -> None:
    code = """
        import os, resource, sys, torch
        from ds_core import arena
        from ds_core.io import Engine
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        os.setuid(65534)
        engine = Engine()
        data, out = arena.empty(1 << 22, torch.uint8), arena.zeros(1 << 22, torch.uint8)
        data.random_(0, 256)
        print(engine.register(data))
        file = engine.open(sys.argv[1], num_bytes=0)
        file.write(data).wait()
        file.read(out).wait()
        print(torch.equal(data, out))
    """
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid != 0 or len(folder.parts) < 3:
            break
        folder.chmod(0o755)
    path = tmp_path / "data"
    path.touch()
    path.chmod(0o666)
    done = run(code, str(path))
    assert done.returncode == 0, done.stderr
    reason, equal = done.stdout.splitlines()
    assert "raise the limit of locked memory (ulimit -l)" in reason or "only io_uring" in reason
    assert equal == "True"


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        pytest.skip("/dev/shm is not there to write to")
    path = folder / f"ds-io-test-{os.getpid()}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def test_a_file_system_without_direct_io(engine: Engine, memory_folder: Path) -> None:
    with engine.open(memory_folder / "data", create=True, num_bytes=100_000) as file:
        assert not file.direct
        assert file.reason == "the file system has no direct I/O for this file"
        data = arena.empty(100_000, torch.uint8).random_(0, 256)
        out = torch.empty_like(data)
        file.write(data).wait()
        file.read(out).wait()
        assert torch.equal(data, out)
        file.close(unlink=True)
