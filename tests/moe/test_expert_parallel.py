"""Expert parallelism x ZeRO in a plain loop equals all experts on one process, computed by a loop."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import ds_moe
import ds_zero
from ds_comm.exchange import HierarchicalAllToAll, PlainAllToAll, QuantizedAllToAll
from ds_moe.dispatch.exchange import torch_all_to_all
from ds_moe.errors import ExpertParallelError
from ds_moe.interfaces import AllToAll
from harness import ranks
from moe.small import H, Small, batch, mean_grads, with_loops

CONFIG = ds_zero.ZeroConfig(persistence_threshold_numel=0)


def trained(
    ep: int,
    stage: int,
    arguments: dict[str, object],
    *,
    replicate: int = 1,
    accumulate: int = 1,
    uneven: bool = False,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Norms of three steps, and the values afterwards."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Small(ep, **arguments)  # type: ignore[arg-type]
    mesh = None
    if replicate > 1:
        mesh = init_device_mesh("cpu", (replicate, world // replicate), mesh_dim_names=("replicate", "shard"))
    mesh_for = ds_moe.expert_mesh(model, mesh)
    model = copy.deepcopy(model)  # as plans do; a copy talks to the same ranks
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
    ds_zero.shard(model, optimizer, stage, mesh, config=CONFIG, mesh_for=mesh_for)
    norms = []
    for step in range(3):
        for micro in range(accumulate):
            loss = model(batch(10 * step + micro, rank, size(rank, uneven))) / accumulate
            if micro + 1 < accumulate:
                with ds_zero.no_sync(model):
                    loss.backward()
            else:
                loss.backward()
        norms.append(ds_zero.clip_grad_norm_(model, 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, ds_zero.full_state_dict(model)


def size(rank: int, uneven: bool) -> int:
    return (0, 9, 1, 14)[rank] if uneven else 9


def reference(
    world: int, arguments: dict[str, object], *, accumulate: int = 1, uneven: bool = False
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = with_loops(Small(1, **arguments))  # type: ignore[arg-type]
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=0.01, foreach=True)
    norms = []
    for step in range(3):
        for micro in range(accumulate):
            batches = [batch(10 * step + micro, rank, size(rank, uneven)) for rank in range(world)]
            mean_grads(model, batches, world * accumulate)
        grads = [p.grad for p in params if p.grad is not None]
        norms.append(ds_zero.total_norm(grads).item())
        torch._foreach_mul_(grads, min(0.5 / (norms[-1] + 1e-6), 1.0))
        optimizer.step()
        optimizer.zero_grad()
    return norms, {n: v.detach() for n, v in model.state_dict().items()}


CASES = [
    # ep, stage, replicas, k, drop_tokens, accumulation, uneven
    (1, 3, 1, 1, True, 1, False),
    (2, 0, 1, 2, True, 2, False),
    (2, 1, 1, 1, False, 1, True),
    (2, 2, 1, 3, False, 2, False),
    (2, 3, 1, 2, False, 1, True),
    (2, 3, 2, 2, True, 2, False),
    (2, 1, 2, 1, True, 1, False),
    (4, 0, 1, 1, False, 1, True),
    (4, 1, 1, 3, True, 2, False),
    (4, 2, 1, 2, False, 1, True),
    (4, 3, 1, 3, True, 1, False),
]


@ranks(4, groups_may_stay=True, timeout_s=120)
def test_equals_a_loop_on_one_process() -> None:
    known: dict[object, tuple[list[float], dict[str, torch.Tensor]]] = {}
    for ep, stage, replicas, k, drop, accumulate, uneven in CASES:
        arguments: dict[str, object] = {"k": k, "drop_tokens": drop, "min_capacity": 1}
        norms, values = trained(
            ep, stage, arguments, replicate=replicas, accumulate=accumulate, uneven=uneven
        )
        key = (k, drop, accumulate, uneven)
        if key not in known:
            known[key] = reference(4, arguments, accumulate=accumulate, uneven=uneven)
        expected_norms, expected = known[key]
        case = f"ep={ep} stage={stage} replicas={replicas} {key}"
        assert norms == pytest.approx(expected_norms, rel=2e-5), case
        if dist.get_rank() == 0:
            assert values.keys() == expected.keys()
            for name, value in values.items():
                torch.testing.assert_close(
                    value, expected[name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name, c=case: f"{c} {n}: {m}"
                )


@ranks(4, groups_may_stay=True)
def test_ranks_whose_experts_no_token_chose_clip_as_the_others() -> None:
    """Every token chooses the same expert, so three of four ranks have no gradient of experts but zeros."""

    def zeroed(model: Small) -> Small:
        for layer in model.layers:
            torch.nn.init.zeros_(layer.router.weight)
            layer.router.weight.requires_grad_(False)
        return model

    arguments: dict[str, object] = {"k": 1, "drop_tokens": False}
    plain = with_loops(zeroed(Small(1, **arguments)))  # type: ignore[arg-type]
    mean_grads(plain, [batch(0, rank) for rank in range(4)], 4)
    expected = ds_zero.total_norm([p.grad for p in plain.parameters() if p.grad is not None]).item()
    for stage in range(4):
        model = zeroed(Small(4, **arguments))  # type: ignore[arg-type]
        mesh_for = ds_moe.expert_mesh(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        ds_zero.shard(model, optimizer, stage, config=CONFIG, mesh_for=mesh_for)
        before = ds_zero.full_state_dict(model)
        model(batch(0, dist.get_rank())).backward()
        assert ds_zero.clip_grad_norm_(model, 1e-3).item() == pytest.approx(expected, rel=2e-5)
        optimizer.step()
        after = ds_zero.full_state_dict(model)
        if dist.get_rank() == 0:
            moved = [(after[n] - before[n]).float() for n in after]
            assert ds_zero.total_norm(moved).item() == pytest.approx(1e-3, rel=1e-3)
            name = "layers.0.experts.expert.down.weight"
            assert (after[name] - before[name]).flatten(1).any(1).sum() == 1


@ranks(4, groups_may_stay=True)
def test_sizes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ExpertParallelError, match="ep_size=3 must divide num_experts=4"):
        Small(3)
    with pytest.raises(ExpertParallelError, match="ep_size=3 must divide the 4 ranks"):
        Small(3, num_experts=6)
    model = Small(4)
    with pytest.raises(ExpertParallelError, match=r"call ds_moe.expert_mesh\(model\)"):
        model(batch(0, 0))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(ExpertParallelError, match=r"ep_size=4 must divide the data axis.* with 2 ranks"):
        ds_moe.expert_mesh(model, mesh)


def gradients(all_to_all: AllToAll) -> tuple[list[torch.Tensor], int]:
    """Gradients of a plain backward without ZeRO, and the bytes of rows that this rank sent."""
    model = Small(4, k=2, drop_tokens=False)
    ds_moe.expert_mesh(model, all_to_all=all_to_all)
    model(batch(0, dist.get_rank(), size(dist.get_rank(), True))).backward()
    sent = sum(layer.counters.traffic.sent_bytes for layer in model.layers)
    return [p.grad for p in model.parameters() if p.grad is not None], sent


@ranks(4, groups_may_stay=True)
def test_other_exchanges_of_rows() -> None:
    """In two hops bit by bit as in one; encoded within the steps of the code, with fewer bytes."""
    plain, plain_bytes = gradients(PlainAllToAll())
    expected, expected_bytes = gradients(torch_all_to_all)
    assert plain_bytes == expected_bytes
    for one, other in zip(plain, expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(gradients(HierarchicalAllToAll(2))[0], plain, strict=True):
        assert torch.equal(one, other)
    for bits, bound in ((8, 0.02), (4, 0.35)):
        coarse, sent = gradients(QuantizedAllToAll(bits))
        # A row is exchanged four times, each time off by at most 1 / 254 (1 / 14) of its largest element.
        for one, other in zip(coarse, plain, strict=True):
            assert (one - other).norm() <= bound * other.norm().clamp_min(1e-3)
        # H elements in fp32, or as codes with one scale.
        assert sent * 4 * H == plain_bytes * (H * bits // 8 + 4)
