"""The memory of a tensor; also for torch's fake tensors, on which `ds_zero.plan` runs this package."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(tensor: Tensor) -> bool:
    """Whether it is a fake tensor, with a shape, a dtype and a storage size, but without elements: code must not
    depend on its values.
    """
    return isinstance(tensor, FakeTensor)


def memory_key(tensor: Tensor) -> int:
    """Returns a key that is equal for tensors with the same memory: the address, or the storage object of a fake
    tensor.
    """
    storage = tensor.untyped_storage()
    return int(storage._cdata) if is_fake(tensor) else storage.data_ptr()


def same_place(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors begin at the same address."""
    return memory_key(a) == memory_key(b) and a.storage_offset() == b.storage_offset()
