"""Messages with checksums: results have the same bits, and a bit that flips on the way is an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_comm
import ds_zero
from ds_comm.exchange.checked import MessageError, _Messages, checked, checksum
from ds_comm.interfaces import Exchange, Transport
from harness import ranks


class Flipping:
    """`Transport` by messages of which rank 0 flips a bit in the message number `at`, as a link would."""

    def __init__(self, group: dist.ProcessGroup, at: int) -> None:
        self.group, self.at, self.sent = group, at, 0

    def exchange(self, tag: int) -> Exchange:
        return _FlippingMessages(self, tag)


class _FlippingMessages(_Messages):
    def __init__(self, owner: Flipping, tag: int) -> None:
        super().__init__(owner.group, tag)
        self._owner = owner

    def reaches(self, rank: int) -> bool:
        return True

    def send(self, rank: int, tensors: Sequence[Tensor]) -> None:
        copies = [tensor.clone() for tensor in tensors]
        if dist.get_rank() == 0 and self._owner.sent == self._owner.at:
            copies[0].view(-1).view(torch.uint8)[5] ^= 4
        self._owner.sent += 1
        super().send(rank, copies)


def train(comm: Any, steps: int = 3, stage: int = 2) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 33), nn.Linear(33, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ds_zero.shard(model, optimizer, stage=stage, comm=comm)
    try:
        for step in range(steps):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step + 10 * dist.get_rank()))
            model(x).square().mean().backward()
            ds_zero.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        ds_zero.destroy(model)
    return torch.cat([param.detach().view(-1) for param in model.parameters()])


def test_every_single_bit_changes_the_checksum() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        x = torch.arange(37).to(dtype)
        before = checksum(x)
        bits = x.view(torch.uint8)
        for place in range(0, len(bits) * 8, 7):
            bits[place // 8] ^= 1 << place % 8
            assert checksum(x) != before
            bits[place // 8] ^= 1 << place % 8
        assert checksum(x) == before


@ranks(2)
def test_the_bits_of_training_are_the_same() -> None:
    for stage in (2, 3):
        plain = train(ds_comm.collectives(), stage=stage)
        assert torch.equal(train(ds_comm.collectives(checked=True), stage=stage), plain)
        only_messages = ds_comm.Collectives(connect=checked(None))
        assert torch.equal(train(only_messages, stage=stage), plain)


@ranks(2)
def test_a_flipped_bit_is_found_by_the_rank_that_receives_it() -> None:
    def flipping(group: Any, device: torch.device, abort: Any) -> Transport:
        return Flipping(group, at=1)

    corrupted = ds_comm.Collectives(connect=flipping)
    silently = train(corrupted, steps=1)  # without checksums the receiver trains with it
    assert torch.equal(silently, train(ds_comm.collectives(), steps=1)) == (dist.get_rank() == 0)
    group = dist.group.WORLD
    assert group is not None
    transport = checked(flipping)(group, torch.device("cpu"), None)  # type: ignore[arg-type]
    assert transport is not None
    other = 1 - dist.get_rank()
    for number in range(3):
        work = transport.exchange(7)
        received = torch.empty(100)
        work.receive(other, [received])
        work.send(other, [torch.full((100,), float(number))])
        if number == 1 and dist.get_rank() == 1:
            with pytest.raises(
                MessageError, match=r"rank 1 of the group received other bits than rank 0 sent"
            ):
                work.wait_received()
        else:
            work.wait_received()
            assert received[99] == number
        work.wait_sent()


def test_on_an_accelerator_it_is_refused() -> None:
    with pytest.raises(ValueError, match="checked messages need tensors on the CPU"):
        checked(None)(None, torch.device("meta"), None)  # type: ignore[arg-type]
