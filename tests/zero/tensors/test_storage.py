"""Where tensors lie, with and without memory."""

from __future__ import annotations

import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_zero.tensors.storage import is_fake, memory_key, same_place


def test_a_view_of_the_same_elements_is_the_same_place_and_another_one_is_not() -> None:
    whole = torch.zeros(8)
    assert same_place(whole[2:4], whole[2:6])
    assert not same_place(whole[2:4], whole[3:4])
    assert not same_place(whole, torch.zeros(8))
    assert not is_fake(whole)


def test_two_storages_over_the_same_memory_have_one_key() -> None:
    array = torch.zeros(4).numpy()
    assert memory_key(torch.from_numpy(array)) == memory_key(torch.from_numpy(array))


def test_tensors_without_memory_are_told_apart_by_storage_and_nobody_asks_for_their_address() -> None:
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, other = torch.zeros(8), torch.zeros(8)
        assert is_fake(whole) and is_fake(torch.nn.Parameter(whole))
        assert same_place(whole[2:4], whole[2:6])
        assert not same_place(whole[2:4], other[2:4])
        assert memory_key(whole) != memory_key(other)
