"""DeepSpeed's functions that estimate the memory of a model's states from its number of parameters.

`ds plan` computes the memory of each rank from a model and a configuration. Use it if there is a model.
"""

from __future__ import annotations

import sys

from torch import nn


def _numbers_of(model: nn.Module) -> tuple[int, int]:
    """Returns (number of parameters, number of parameters of the largest layer)."""
    total = sum(p.numel() for p in model.parameters())
    layers = (sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    return total, max(layers, default=0)


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """Returns (bytes of host memory per node, bytes per GPU) for 16-bit training with Adam. Per parameter there are 2
    bytes on each GPU, and 16 bytes sharded over ranks: master, gradient and two optimizer states of 4 bytes each.
    """
    ranks = num_gpus_per_node * num_nodes
    whole, divided = 2 * total_params, 16 * total_params
    if cpu_offload:
        return int(divided / num_nodes * additional_buffer_factor), int(whole)
    return int(4 * total_params * num_gpus_per_node * additional_buffer_factor), int(whole + divided / ranks)


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """Returns (bytes of host memory per node, bytes per GPU, bytes of the largest layer while it is gathered)."""
    ranks = num_gpus_per_node * num_nodes
    layer = 2 * 2 * largest_layer_params  # its parameters, and its gradients or the next layer's parameters
    loading = (largest_layer_params if zero_init else total_params) * 4 * num_gpus_per_node
    on_host = (16 + 2 * cpu_offload_params) * total_params / num_nodes if cpu_offload else 0
    on_device = (0 if cpu_offload else 16) + (0 if cpu_offload and cpu_offload_params else 2)
    host = max(on_host, loading) * additional_buffer_factor
    return int(host), int(layer + on_device * total_params / ranks), layer


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Prints the estimates for all variants of offloading."""
    rows = [
        (*estimate_zero2_model_states_mem_needs(total_params, num_gpus_per_node, num_nodes, offload,
                                                additional_buffer_factor),
         f"offload_optimizer={'cpu' if offload else 'none'}")
        for offload in (True, False)
    ]  # fmt: skip
    _show(2, total_params, rows, num_gpus_per_node, num_nodes)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Prints the estimates for all variants of offloading and construction."""
    rows = []
    for offload, params in ((True, True), (True, False), (False, False)):
        for early in (True, False):
            host, device, _ = estimate_zero3_model_states_mem_needs(
                total_params, largest_layer_params, num_gpus_per_node, num_nodes, offload, params, early,
                additional_buffer_factor,
            )  # fmt: skip
            what = f"offload_param={'cpu' if params else 'none'}, offload_optimizer={'cpu' if offload else 'none'}"
            rows.append((host, device, f"{what}, zero_init={int(early)}"))
    _show(3, total_params, rows, num_gpus_per_node, num_nodes)


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Prints the estimates for a model."""
    estimate_zero2_model_states_mem_needs_all_cold(
        _numbers_of(model)[0], num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Prints the estimates for a model."""
    estimate_zero3_model_states_mem_needs_all_cold(
        *_numbers_of(model), num_gpus_per_node, num_nodes, additional_buffer_factor
    )


def _show(stage: int, params: int, rows: list[tuple[int, int, str]], gpus: int, nodes: int) -> None:
    lines = [
        f"Estimated memory for model states (ZeRO-{stage}, {params / 1e6:.0f}M parameters, {nodes} node(s) of {gpus} "
        "GPU(s)):",
        "  per CPU  |  per GPU |   Options",
        *(f"  {host / 2**30:7.2f}GB | {device / 2**30:6.2f}GB | {what}" for host, device, what in rows),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
