"""Page-locked memory: how much is locked, when it is released, and what is said if it cannot be locked."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_core import arena, host_limits, pinned
from ds_core.pinned import Pinning

MLOCK = Pinning(mode="mlock")


def system_counts() -> int:
    """Locked bytes of this process, as the system counts them."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("VmLck:")[2].split()[0])


def permitted() -> int:
    limits = host_limits.pinned_limits()
    return limits[0].available_bytes if limits else 1 << 40


@pytest.mark.skipif(permitted() < 80 << 20, reason="ulimit -l permits too little")
@pytest.mark.parametrize("num_bytes", [1 << 20, (1 << 20) + 1, 5_000_001, 33_600_000, 67_108_865])
def test_no_more_is_locked_than_was_asked_for(num_bytes: int) -> None:
    gc.collect()
    before, of_arena, of_system = pinned.locked_bytes(), arena.stats().in_use_bytes, system_counts()
    tensor = pinned.empty(num_bytes, torch.uint8, MLOCK)
    locked = pinned.locked_bytes() - before
    assert num_bytes <= locked <= 1.01 * num_bytes
    assert arena.stats().in_use_bytes - of_arena == locked == system_counts() - of_system
    assert tensor.data_ptr() % 4096 == 0 and tensor.shape == (num_bytes,)
    tensor.fill_(7)
    view = tensor[5:10]
    del tensor
    assert pinned.locked_bytes() - before == locked, "a view keeps it"
    assert view.tolist() == [7] * 5
    del view
    assert (pinned.locked_bytes(), system_counts()) == (before, of_system)


def test_neighbours_do_not_share_a_page() -> None:
    first, second = (pinned.empty(100, torch.float32, MLOCK) for _ in range(2))
    assert abs(first.data_ptr() - second.data_ptr()) >= 65536
    del first
    second.fill_(1.0)  # its pages are still locked
    assert pinned.locked_bytes() >= 65536


def test_how_memory_is_locked_and_why_not() -> None:
    assert pinned.choose(False, "cuda").reason == "pin_memory is false"
    assert pinned.choose(True, "cpu") == Pinning(
        mode="plain", reason="there is no accelerator, so nothing is copied to one"
    )
    other = pinned.choose(True, "xpu")
    assert other.mode == "torch" and "no library for xpu" in other.reason and "powers of two" in other.reason


def test_a_limit_is_named_before_anything_is_allocated() -> None:
    script = """
import resource, torch
from ds_core import arena, host_limits, pinned
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
status = host_limits._status
host_limits._status = lambda roots: {**status(roots), "CapEff": "0"}  # as without CAP_IPC_LOCK
before = arena.stats().in_use_bytes
try:
    pinned.empty(8 << 20, torch.uint8, pinned.Pinning(mode="mlock"))
    raise SystemExit("not refused")
except host_limits.NotEnoughMemory as error:
    said = str(error)
assert "8 MiB for page-locked memory, but RLIMIT_MEMLOCK (ulimit -l) permits only" in said, said
assert "ulimit -l unlimited" in said and arena.stats().in_use_bytes == before
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


FAKE = """
#include <stdint.h>
#include <stddef.h>
int ds_gpu_abi() { return ABI; }
const char* ds_gpu_message(int status) { return status == 2 ? "out of memory" : "?"; }
int ds_gpu_num_devices() { return 1; }
static uint64_t g_bytes = 0; static int g_calls = 0, g_fail = 0; static void* g_first = 0;
int ds_gpu_host_register(void* pages, uint64_t size) {
  if (g_fail) return 2;
  g_bytes += size; g_calls++; g_first = pages; return 0;
}
int ds_gpu_host_unregister(void* pages) { g_calls--; return pages != g_first; }
uint64_t fake_bytes() { return g_bytes; }
int fake_calls() { return g_calls; }
void fake_fail() { g_fail = 1; }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_memory_is_registered_with_the_device_and_released(tmp_path: Path) -> None:
    """A GPU library that only counts what is registered: the binding passes whole pages, and unregisters them."""
    header = (Path(__file__).parents[2] / "cpp/include/ds/gpu.h").read_text()
    abi = header.partition("#define DS_GPU_ABI ")[2].split()[0]
    names = [
        line.partition("X(")[2].partition(",")[0] for line in header.splitlines() if line.startswith("  X(")
    ]
    source = FAKE.replace("ABI", abi) + "".join(f"int ds_gpu_{name}() {{ return 1; }}\n" for name in names)
    (tmp_path / "fake.c").write_text(source)
    library = tmp_path / "libfake.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "fake.c"], check=True, timeout=120)
    script = f"""
import ctypes, os, warnings
os.environ["DS_CUDA_LIBRARY"] = {str(library)!r}
import torch
from ds_core import pinned
counts = ctypes.CDLL({str(library)!r})
counts.fake_bytes.restype = ctypes.c_uint64
how = pinned.choose(True, "cuda")
assert how == pinned.Pinning(mode="device"), how
tensor = pinned.empty(1_000_001, torch.float32, how)
assert 4_000_004 <= counts.fake_bytes() <= 4_000_004 * 1.01 and counts.fake_calls() == 1
assert pinned.locked_bytes() == counts.fake_bytes()
del tensor
assert counts.fake_calls() == 0 and pinned.locked_bytes() == 0
counts.fake_fail()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    plain = pinned.empty(1000, torch.float32, how)
assert "could not be page-locked (out of memory)" in str(caught[0].message) and plain.shape == (1000,)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
