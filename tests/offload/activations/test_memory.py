"""What should have moved has moved: memory of the device, which is counted apart from that of the host."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from ds_core import arena
from ds_offload import ActivationOffload, ActivationOptions, NVMeOptions, SwapError
from ds_zero.predict.measured_memory import counted_memory
from offload.activations.models import gradients, net, same

LAYERS = 8


def peaks(offload: ActivationOffload | None) -> tuple[dict[str, int], int]:
    """Peaks of torch's allocations in forward and backward, and the most bytes in ds_core's arena."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(LAYERS)))
    x = torch.randn(4096, 64)  # 1 MiB, and so have all activations
    if offload is not None:
        offload.attach(model)
    for _ in range(2):
        model(x).sum().backward()
    gc.collect()
    start = arena.stats().in_use_bytes
    held = 0
    with counted_memory() as counted:
        counted.mark("forward")
        loss = model(x).sum()
        held = arena.stats().in_use_bytes - start
        counted.mark("backward")
        loss.backward()
    return dict(counted.phase_bytes), held


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_activations_are_not_on_the_device_between_forward_and_backward(device: str, tmp_path: Path) -> None:
    options = ActivationOptions(
        device=device, nvme_path=tmp_path, max_host_bytes=3 << 20 if device == "nvme" else None
    )  # type: ignore[arg-type]
    offload = ActivationOffload(options)
    plain, _ = peaks(None)
    moved, _ = peaks(offload)
    mib = 1 << 20
    # Tanh saves its output, which is also the input that the next Linear saves.
    assert plain["forward"] >= LAYERS * mib
    assert moved["forward"] <= 3.1 * mib, "what one layer computes, of eight"
    assert moved["backward"] <= 5 * mib < plain["backward"]
    offload.close()


def test_moved_bytes_are_in_host_memory() -> None:
    offload = ActivationOffload(ActivationOptions())
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(LAYERS)))
    offload.attach(model)
    gc.collect()
    start = arena.stats().in_use_bytes
    loss = model(torch.randn(4096, 64)).sum()
    assert arena.stats().in_use_bytes - start == offload.statistics.moved_bytes == (LAYERS + 1) << 20
    del loss
    offload.close()
    assert arena.stats().in_use_bytes == start


def test_host_memory_for_the_disk_is_limited(tmp_path: Path) -> None:
    offload = ActivationOffload(
        ActivationOptions(device="nvme", nvme_path=tmp_path, min_bytes=512, max_host_bytes=32 << 10)
    )
    model = net(layers=6)
    expected = gradients(model)
    gc.collect()
    start = arena.stats().in_use_bytes
    for _ in range(2):
        assert same(gradients(model, offload), expected)
    assert offload.statistics.kept_bytes == 0
    assert arena.stats().in_use_bytes - start <= 2 * (32 << 10)
    assert offload.statistics.moved_bytes > 20 * (32 << 10)
    offload.close()
    assert arena.stats().in_use_bytes == start


def files_in(folder: Path) -> list[int]:
    """Descriptors of files in a folder, which have no names."""
    links = [(link, os.readlink(link)) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [int(link.name) for link, target in links if str(folder) in target]


def test_space_on_the_disk_is_used_again_and_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_offload.activations.disk_space.FILE_BYTES", 1 << 20)
    offload = ActivationOffload(ActivationOptions(device="nvme", nvme_path=tmp_path, min_bytes=512))
    model = net()
    for seed in range(3):
        gradients(model, offload, seed)
    (place,) = offload._places.values()
    assert place.in_use_bytes == 0
    space = place.space  # type: ignore[attr-defined]
    assert space.num_bytes <= 2 << 20 and offload.statistics.moved_bytes > 2 << 20
    assert all(file.free == [(0, file.swap.num_bytes)] for file in space._files), (
        "free ranges were not joined"
    )
    assert files_in(tmp_path) and not list(tmp_path.iterdir())
    offload.close()
    assert not files_in(tmp_path)


def test_an_offload_that_is_dropped_frees_its_files(tmp_path: Path) -> None:
    offload = ActivationOffload(ActivationOptions(device="nvme", nvme_path=tmp_path, min_bytes=512))
    gradients(net(), offload)
    assert files_in(tmp_path)
    del offload
    gc.collect()
    assert not files_in(tmp_path)


def test_values_that_the_disk_changes_are_found(tmp_path: Path) -> None:
    options = ActivationOptions(
        device="nvme", nvme_path=tmp_path, min_bytes=512, max_host_bytes=0, nvme=NVMeOptions(direct=False)
    )
    offload = ActivationOffload(options)
    x = torch.randn(64, 64, requires_grad=True)
    with offload:
        y = x.exp()
        z = y.sin()
        y.detach().cos_()
    with offload:
        torch.ones(
            64, 64, requires_grad=True
        ).exp()  # takes the only buffer, so that the first one is on the disk
    for number in files_in(tmp_path):
        os.pwrite(number, b"\x01\x02\x03", 100)
    with pytest.raises(
        SwapError, match=r"an activation of 16384 bytes was changed on the disk: .*\.swap, byte 0 on"
    ):
        z.sum().backward()
    offload.close()


def test_a_disk_without_room_is_an_error_that_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offload = ActivationOffload(ActivationOptions(device="nvme", nvme_path=tmp_path, min_bytes=512))
    monkeypatch.setattr("shutil.disk_usage", lambda _: os.statvfs_result((0,) * 10) and _Usage())
    with pytest.raises(OSError, match=r"needs 0.000 GiB for this rank, and 0.000 GiB are free"), offload:
        net()(torch.zeros(4, 16, dtype=torch.long))
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    missing = ActivationOffload(
        ActivationOptions(device="nvme", nvme_path=tmp_path / "missing", min_bytes=512)
    )
    with pytest.raises(NotADirectoryError, match="does not exist: create it"), missing:
        net()(torch.zeros(4, 16, dtype=torch.long))


class _Usage:
    free = 0
