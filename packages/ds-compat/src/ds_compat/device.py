"""`deepspeed.accelerator.get_accelerator()`: DeepSpeed's interface of the training device."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

torch_info: dict[str, Any] = {
    "version": ".".join(torch.__version__.split(".")[:2]),
    "bf16_support": True,
    "cuda_version": torch.version.cuda or "0.0",
    "nccl_version": "0.0",
    "hip_version": torch.version.hip or "0.0",
}


class DeepSpeedAccelerator:
    """An accelerator of torch. Other attributes are looked up in torch's module for it, such as `torch.cuda`."""

    _name = "cuda"
    _communication_backend_name = "nccl"

    def __getattr__(self, name: str) -> Any:
        home = torch.get_device_module(self._name)
        return (
            getattr(home, name)
            if hasattr(home, name) or not name.endswith("Tensor")
            else getattr(torch, name)
        )

    # --- which

    def device_name(self, device_index: int | None = None) -> str:
        return self._name if device_index is None else f"{self._name}:{device_index}"

    def current_device_name(self) -> str:
        return self.device_name(self.current_device())

    def is_available(self) -> bool:
        return torch.accelerator.is_available()

    def communication_backend_name(self) -> str:
        return str(torch.distributed.get_default_backend_for_device(self._name))

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._name

    # --- what it is like

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return self.is_synchronized_device()

    resolves_data_dependency = handles_memory_backpressure = use_host_timers

    def is_bf16_supported(self) -> bool:
        return True

    is_fp16_supported = is_bf16_supported

    def is_triton_supported(self) -> bool:
        return not self.is_synchronized_device()

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    # --- memory, streams, random numbers

    def available_memory(self, device_index: int | None = None) -> int:
        return int(torch.get_device_module(self._name).mem_get_info(device_index)[0])

    def total_memory(self, device_index: int | None = None) -> int:
        return int(torch.get_device_module(self._name).mem_get_info(device_index)[1])

    def random(self) -> Any:
        return torch.random

    def default_generator(self, device_index: int) -> torch.Generator:
        return torch.get_device_module(self._name).default_generators[device_index]  # type: ignore[no-any-return]

    def pin_memory(self, tensor: torch.Tensor, make_copy: bool = True, **_: Any) -> torch.Tensor:
        return tensor.pin_memory()

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        return callback()

    def range_push(self, msg: str, **_: Any) -> Any:
        return None

    def range_pop(self, **_: Any) -> Any:
        return None

    def amp(self) -> Any:
        return torch.amp

    # --- other methods that code uses

    def visible_devices_envs(self) -> list[str]:
        return ["CUDA_VISIBLE_DEVICES"]

    def set_visible_devices_envs(self, current_env: dict[str, str], local_accelerator_ids: list[int]) -> None:
        for name in self.visible_devices_envs():
            current_env[name] = ",".join(map(str, local_accelerator_ids))

    def export_envs(self) -> list[str]:
        return ["NCCL", "LD_LIBRARY", "PATH"]

    def get_compile_backend(self) -> str:
        return "inductor"

    def create_op_builder(self, class_name: str) -> Any:
        return self.get_op_builder(class_name)()

    def get_op_builder(self, class_name: str) -> Any:
        from ds_compat.ops import builders

        return getattr(builders, class_name, None)


class CUDA_Accelerator(DeepSpeedAccelerator):
    """GPUs of NVIDIA, and of AMD, which torch calls so, too."""


class XPU_Accelerator(DeepSpeedAccelerator):
    """GPUs of Intel."""

    _name = "xpu"


class NPU_Accelerator(DeepSpeedAccelerator):
    """Ascend's, with torch_npu."""

    _name = "npu"


class MPS_Accelerator(DeepSpeedAccelerator):
    """GPUs of Apple."""

    _name = "mps"


class CPU_Accelerator(DeepSpeedAccelerator):
    """The CPU, on which operations are synchronous."""

    _name = "cpu"
    _communication_backend_name = "gloo"

    def device_name(self, device_index: int | None = None) -> str:
        return "cpu"

    def device(self, device_index: int | None = None) -> Any:
        return contextlib.nullcontext()

    def set_device(self, device_index: int | None = None) -> None:
        return None

    synchronize = empty_cache = reset_max_memory_allocated = set_device

    def current_device(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def device_count(self) -> int:
        """Returns the number of local ranks of the launcher, else the number of NUMA nodes."""
        given = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
        nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
        return int(given) if given else max(1, nodes)

    def is_available(self) -> bool:
        return True

    def is_synchronized_device(self) -> bool:
        return True

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        torch.set_rng_state(new_state)

    def manual_seed(self, seed: int) -> Any:
        return torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def initial_seed(self) -> int:
        return torch.initial_seed()

    def default_generator(self, device_index: int) -> torch.Generator:
        return torch.default_generator

    @property
    def Stream(self) -> Any:
        return None

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def current_stream(self, device_index: int | None = None) -> Any:
        return None

    default_stream = current_stream

    @property
    def Event(self) -> Any:
        return None

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Returns the resident memory of this process, in bytes."""
        return _status("VmRSS")

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return _status("VmHWM")

    memory_cached = memory_reserved = memory_allocated
    max_memory_cached = max_memory_reserved = max_memory_allocated
    reset_max_memory_cached = reset_peak_memory_stats = reset_max_memory_allocated

    def memory_stats(self, device_index: int | None = None) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": self.memory_allocated(),
            "allocated_bytes.all.peak": self.max_memory_allocated(),
        }

    def total_memory(self, device_index: int | None = None) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def available_memory(self, device_index: int | None = None) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return True

    def pin_memory(self, tensor: torch.Tensor, make_copy: bool = True, **_: Any) -> torch.Tensor:
        return tensor


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


@functools.lru_cache(1)
def get_accelerator() -> DeepSpeedAccelerator:
    """Returns the accelerator of this machine, or the CPU if there is none or DS_ACCELERATOR=cpu is set."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("DS_ACCELERATOR") == "cpu":
        return CPU_Accelerator()
    known = {
        kind._name: kind for kind in (CUDA_Accelerator, XPU_Accelerator, NPU_Accelerator, MPS_Accelerator)
    }
    made = known.get(accelerator.type, DeepSpeedAccelerator)()
    made._name = accelerator.type
    return made


def training_device() -> torch.device:
    """Returns the device of this rank."""
    here = get_accelerator()
    if here.device_name() == "cpu":
        return torch.device("cpu")
    return torch.device(here.device_name(), here.current_device())


def is_current_accelerator_supported() -> bool:
    return True
