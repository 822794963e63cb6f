"""Where a tensor's elements lie; also for tensors without memory (torch's fake tensors), on which `ds_zero.plan`
runs this package.
"""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(tensor: Tensor) -> bool:
    """Whether it has a shape, a dtype and a storage's size, but no elements: nothing may depend on its
    values.
    """
    return isinstance(tensor, FakeTensor)


def memory_key(tensor: Tensor) -> int:
    """Equal for tensors over the same memory: its address, or the storage itself where there is none."""
    storage = tensor.untyped_storage()
    return int(storage._cdata) if is_fake(tensor) else storage.data_ptr()


def same_place(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors begin at the same element of the same memory."""
    return memory_key(a) == memory_key(b) and a.storage_offset() == b.storage_offset()
