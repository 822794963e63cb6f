"""`ds doctor`: checks versions, devices and limits of this machine."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from ds_engine.launch.machine import format_bytes, memory_bytes, memory_limit_bytes, usable_cores

PACKAGES = ("ds-core", "ds-comm", "ds-zero", "ds-offload", "ds-engine")
OPTIONAL = ("ds-pipe", "ds-moe", "ds-layers", "ds-profiler", "ds-compat")
OLDEST_TORCH = (2, 11)
_SHM_ENOUGH_BYTES = 1 << 30
_REINSTALL_CORE = "reinstall it: pip install --force-reinstall --no-deps ds-core"


@dataclass(frozen=True)
class Finding:
    """One row: what was checked, the result, and the remedy if there is a problem."""

    name: str
    value: str
    status: Literal["ok", "warning", "error"] = "ok"
    remedy: str = ""


def examine() -> list[Finding]:
    """Checks this interpreter and this machine. Imports torch and ds_core; changes nothing."""
    versions = {name: version for name in (*PACKAGES, *OPTIONAL) if (version := installed_version(name))}
    return [
        Finding("python", f"{platform.python_version()} ({sys.executable})"),
        *check_versions(versions),
        *check_torch(),
        *check_native(),
        *check_machine(),
        check_launcher(os.environ),
        *check_strangers(os.environ, installed_version("deepspeed"), "ds-compat" in versions),
    ]


def installed_version(name: str) -> str | None:
    """Returns the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_versions(versions: Mapping[str, str]) -> Iterable[Finding]:
    """Checks that all required packages are installed, in the same version."""
    expected = versions.get("ds-engine", "?")
    for name in PACKAGES:
        if name not in versions:
            yield Finding(name, "not installed", "error", f"pip install {name}=={expected}")
    for name, version in versions.items():
        if version == expected:
            yield Finding(name, version)
        else:
            remedy = f"all packages must have the same version: pip install {name}=={expected}"
            yield Finding(name, f"{version}, but ds-engine is {expected}", "error", remedy)


def check_torch() -> Iterable[Finding]:
    """Checks torch, its devices, and the backend of torch.distributed for them."""
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        yield Finding("torch", str(error), "error", "pip install torch")
        return
    version = str(torch.__version__)
    new_enough = tuple(int(part) for part in version.split("+")[0].split(".")[:2]) >= OLDEST_TORCH
    yield (
        Finding("torch", version)
        if new_enough
        else Finding(
            "torch", version, "error", f"torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or later is needed"
        )
    )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        yield Finding("devices", "no accelerator: CPU only")
        wanted = ["gloo"]
    else:
        module = torch.get_device_module(accelerator)
        count = torch.accelerator.device_count()
        names = sorted({str(module.get_device_name(i)) for i in range(count)})
        yield Finding("devices", f"{count} x {accelerator.type}: {', '.join(names)}")
        wanted = ["gloo", str(dist.get_default_backend_for_device(accelerator))]
    for backend in wanted:
        if dist.is_available() and dist.is_backend_available(backend):
            yield Finding(backend, "available")
        else:
            yield Finding(backend, "missing", "error", f"install a build of torch that has {backend}")


def check_native() -> Iterable[Finding]:
    """Checks whether ds_core's native library is loaded, and for which CPU target."""
    try:
        native = import_module(
            "ds_core._native"
        )  # all packages have the same version, so its private names may be used
    except Exception as error:  # noqa: BLE001  (whatever is wrong with it is what the user wants to know)
        yield Finding(
            "ds_core", f"cannot be imported: {type(error).__name__}: {error}", "error", _REINSTALL_CORE
        )
        return
    if native.MISSING is not None:
        value = f"native library missing, so kernels run in plain torch: {native.MISSING}"
        yield Finding(
            "ds_core", value, "warning", f"optimizers on the CPU are several times slower; {_REINSTALL_CORE}"
        )
        return
    chosen, possible = native.core.cpu_target(), ", ".join(native.core.available_cpu_targets())
    yield Finding("CPU kernels", f"{chosen} (this machine can run: {possible}); more: python -m ds_core")


def check_machine() -> Iterable[Finding]:
    """Checks cores, memory, and the limits that can end a job unexpectedly."""
    yield Finding("cores", f"{usable_cores()} usable of {os.cpu_count()}")
    total, limit = memory_bytes(), memory_limit_bytes()
    yield Finding("memory", f"{format_bytes(total)}, limit of the cgroup: {format_bytes(limit)}")
    yield check_huge_pages(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    shm = Path("/dev/shm")
    if shm.is_dir():
        yield check_shm(shutil.disk_usage(shm).total)
    else:
        yield Finding("/dev/shm", "missing", "error", "mount a tmpfs there: data loaders and nccl need it")
    yield check_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])


def check_launcher(environ: Mapping[str, str]) -> Finding:
    """Says which rank a script would have that started in this environment."""
    try:
        from ds_comm import PlacementError, detect
    except ImportError as error:
        return Finding("rank", str(error), "error", "pip install ds-comm")
    try:
        return Finding("rank", str(detect(environ)))
    except PlacementError as error:
        return Finding("rank", str(error), "error", "start scripts as the message says")


def check_huge_pages(setting: Path) -> Finding:
    """Checks transparent huge pages, which optimizer states use if the kernel permits it."""
    text = setting.read_text().strip() if setting.exists() else ""
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in ("always", "madvise"):
        return Finding("huge pages", chosen)
    remedy = f"as root: echo madvise > {setting} (CPU optimizers are slower without)"
    return Finding("huge pages", chosen or "not offered by this kernel", "warning", remedy)


def check_shm(size_bytes: int) -> Finding:
    """Checks the size of /dev/shm, which is 64 MiB in containers by default."""
    if size_bytes >= _SHM_ENOUGH_BYTES:
        return Finding("/dev/shm", format_bytes(size_bytes))
    remedy = "data loaders and nccl may end with SIGBUS: docker run --shm-size=8g, or mount a larger tmpfs"
    return Finding("/dev/shm", format_bytes(size_bytes), "warning", remedy)


def check_locked_memory(limit_bytes: int) -> Finding:
    """Checks `ulimit -l`: memory that may be pinned for copies to devices and for I/O."""
    if limit_bytes == resource.RLIM_INFINITY:
        return Finding("ulimit -l", "unlimited")
    remedy = "pinned I/O buffers are limited to this: ulimit -l unlimited, or docker run --ulimit memlock=-1"
    return Finding(
        "ulimit -l", format_bytes(limit_bytes), "ok" if limit_bytes >= 1 << 30 else "warning", remedy
    )


def check_strangers(environ: Mapping[str, str], deepspeed: str | None, ds_compat: bool) -> Iterable[Finding]:
    """Checks for other programs called `ds`, and for DeepSpeed, whose import name ds-compat uses, too."""
    if deepspeed is not None and not ds_compat:
        yield Finding("deepspeed", f"{deepspeed} is installed, too; `import deepspeed` imports it")
    for command in ("ds", "deepspeed"):
        places = find_commands(command, environ.get("PATH", ""))
        foreign = [place for place in places if not is_ours(place)]
        if not foreign:
            continue
        first = command == "ds" and places[0] == foreign[0]
        ours = Path(sys.executable).parent
        remedy = f"`{command}` starts {places[0]}: use `python -m ds_engine`, or put {ours} first on PATH"
        text = ", ".join(str(place) for place in foreign)
        yield Finding(f"foreign {command}", text, "warning" if first else "ok", remedy if first else "")


def find_commands(name: str, path: str) -> list[Path]:
    """Returns all executables of this name on PATH, in order."""
    places = [Path(folder or ".") / name for folder in path.split(os.pathsep)]
    return [place for place in dict.fromkeys(places) if place.is_file() and os.access(place, os.X_OK)]


def is_ours(command: Path) -> bool:
    """Whether this script starts ds_engine (or ds_compat, which provides `deepspeed`)."""
    with command.open("rb") as file:
        head = file.read(4096)
    return b"ds_engine" in head or b"ds_compat" in head


def show_json(findings: Iterable[Finding]) -> None:
    """Prints `{"ok": bool, "findings": [...]}`."""
    rows = [asdict(finding) for finding in findings]
    print(json.dumps({"ok": all(row["status"] != "error" for row in rows), "findings": rows}, indent=2))


def show_table(findings: Iterable[Finding]) -> None:
    """Prints a table, and the remedies below it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = list(findings)
    colours = {"ok": "green", "warning": "yellow", "error": "bold red"}
    table = Table("", "found", "", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row.name, Text(row.value), Text(row.status, style=colours[row.status]))
    console = Console()
    console.print(table)
    for row in rows:
        if row.status != "ok":
            console.print(
                Text(f"{row.status}: {row.name}: {row.remedy}", style=colours[row.status]), soft_wrap=True
            )
    if all(row.status == "ok" for row in rows):
        console.print("no problems found")
