"""Options of `shard`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Accumulation = Literal["local", "sharded"]
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """Options of `ds_zero.shard`. By default, each one adapts to the model and the stage."""

    accumulation: Accumulation | None = None
    """How gradients of several micro-batches are summed: "local" adds whole gradients in fp32 on each rank
    and reduces once at the boundary; "sharded" reduces every micro-batch and adds shards. None: local in
    stages 0 and 1, sharded in 2 and 3. The plans differ in the last bits of the sums, within one plan all
    stages agree bitwise."""

    accumulation_steps: int | None = None
    """Backwards per optimizer step, for the local plan: the reduction overlaps with the last of them. None: as many as
    in the previous step (the first step reduces inside `step`). A wrong number only costs overlap: gradients that were
    not reduced by then are reduced inside `step`."""

    param_dtype: torch.dtype | None = None
    """Dtype in which floating-point parameters compute; the fp32 masters keep the values from before the
    cast. None: as given."""

    dtype_for: Callable[[str, nn.Parameter], torch.dtype | None] | None = None
    """Dtype in which one floating-point parameter computes, from its name; None from it keeps the dtype that
    is given. Takes the place of `param_dtype`, for example to keep some modules in fp32."""

    grad_dtype: torch.dtype = torch.float32
    """Dtype in which gradients are summed over micro-batches and rest until the step. A 16-bit dtype halves
    that memory and rounds after every addition; sums over ranks are taken in fp32 all the same where the
    collective allows it."""

    reduce_bucket_numel: int | None = None
    """Elements a bucket holds at most (a larger parameter has its own), stages 0 to 2 and whole parameters of
    stage 3.
    None: an eighth of the model, between 2**18 and 2**25."""

    publish_bucket_numel: int | None = None
    """Stages 1 and 2: elements that one message of new parameters holds at most over all ranks. None: a whole
    bucket. Smaller messages cost a copy and save the collective's own buffers."""

    persistence_threshold_numel: int | None = None
    """Stage 3: parameters of at most so many elements stay whole on every rank. None: up to 1e5, within 2% of
    the model."""

    model_persistence_numel: int | None = None
    """Stage 3: elements of parameters that stay whole by the threshold above, all together at most. None: no
    limit of their own."""

    layout: Literal["flat", "whole"] | None = None
    """How masters and states are divided: "flat" cuts tensors so that ranks share them evenly; "whole" gives
    every tensor to one rank, for optimizers that need whole ones. None: what the optimizer needs, in each of
    its groups; [Note: three kinds of optimizer]."""

    secondary_ranks: int = 1
    """Stage 3: groups of so many neighbouring ranks keep a second copy of the parameters, in compute dtype and
    divided among them; only the first gather after a step leaves the group. 1: no such copy.
    [Note: secondary shards]"""

    overlap_reduce: bool | None = None
    """Whether backward goes on while a bucket's gradients are reduced. False: it waits for each. None: yes."""

    reduce_scatter: bool = True
    """Whether a rank receives only its slice of a reduced bucket, stages 1 to 3. False: everybody receives
    everything and keeps a slice, for twice the bytes and the same values."""

    ordered_reduction: bool | None = None
    """Sum over ranks in the order of a fixed binary tree, [Note: ordered reduction]. False: in the backend's
    own order. None: ordered on the CPU, where it is also faster. Without effect where `comm` is given."""

    read_neighbours: bool = True
    """On the CPU ranks of one machine copy slices out of each other's memory where the system lets them; what they
    would have sent is counted all the same. False: everything is sent. [Note: peer memory]"""

    rank_invariant: bool = False
    """The same micro-batches give bitwise the same training on 1, 2, 4, 8, ... ranks, [Note: tree over
    micro-batches]: ordered reduction, the sharded plan, and up to log2(micro-batches per rank) - 1 more shards
    of fp32 gradients. Loss weights and numbers of micro-batches have to be powers of two, and rank r of W has
    to take micro-batches r, W + r, 2W + r, ..."""

    communication_dtype: torch.dtype | None = None
    """Dtype in which gradients travel; sums are taken in fp32 by the ordered reduction, else by the backend in
    this dtype. None: as they were accumulated."""

    reduce_op: Literal["mean", "sum"] = "mean"
    """Whether gradients are averaged or added over ranks."""

    sparse_gradients: bool = False
    """Stage 0: gradients of `nn.Embedding` and `nn.EmbeddingBag` travel as the rows that are not zero, where that is
    less than the whole; the same bits come out. Optimizers see dense gradients. [Note: gradients by rows]"""

    predivide_factor: float = 1.0
    """Gradients are divided by it before they travel, and sums multiplied by it after: keeps narrow dtypes
    from overflowing. [Note: mean in parts]"""

    ignore_unused: bool = True
    """Whether a parameter may be left without gradient. False: an error at the step, on every rank, that names
    the parameters which some rank did not use."""

    prefetch: bool = True
    """Stage 3: start gathering the next module, in the order of the previous pass, while the present one
    computes."""

    prefetch_numel: int | None = None
    """Stage 3: further modules are fetched ahead while fewer elements than this are being gathered. None: only the next
    module. 0: none."""

    max_live_numel: int | None = None
    """Stage 3: the number of gathered elements up to which modules are fetched ahead or kept for later. The module that
    runs is gathered whatever its size. None: no limit; by default little is fetched ahead or kept."""

    max_reuse_distance_numel: int | None = None
    """Stage 3: a module stays gathered if at most so many elements are used before it is used again. None: 0,
    which keeps only what the very next module uses again."""

    leaf_modules: tuple[type[nn.Module] | str, ...] = ()
    """Stage 3: modules (classes, class names or module names) that are gathered with all they contain, because
    ranks use different parts of them. Mixtures of experts are found without it. [Note: leaf modules]"""

    module_granularity_numel: int = 0
    """Stage 3: modules with at most so many parameter elements per module inside are gathered whole. 0: blocks
    are, whatever their size."""

    order_timeout_s: float = 30.0
    """Seconds without progress after which ranks that wait for each other in different modules raise
    `RankOrderError`; four times as long if their order agrees so far. 0: no check.
    [Note: standing still]"""

    overlap_publish: bool = False
    """Stages 1 and 2: `step` returns while parameters are still being gathered. Every module of the model waits before
    it computes, and so do `state_dict`, `load_state_dict` and ds_zero's own functions. Do not set it if your code reads
    parameters in another way right after a step (`for p in model.parameters()`)."""

    def __post_init__(self) -> None:
        if self.accumulation not in (None, "local", "sharded"):
            raise ValueError(f'accumulation={self.accumulation!r}: give "local", "sharded" or None')
        if self.accumulation_steps is not None and self.accumulation_steps < 1:
            raise ValueError(f"accumulation_steps={self.accumulation_steps}: give 1 or more, or None")
        if self.rank_invariant and (self.accumulation == "local" or self.ordered_reduction is False):
            raise ValueError(
                "rank_invariant=True needs the sharded accumulation plan and the ordered reduction: leave "
                "`accumulation` and `ordered_reduction` at None"
            )
        if self.secondary_ranks < 1:
            raise ValueError(f"secondary_ranks={self.secondary_ranks}: give the size of a group, 1 for none")
        if self.layout not in (None, "flat", "whole"):
            raise ValueError(f'layout={self.layout!r}: give "flat", "whole" or None')
        if self.reduce_op not in ("mean", "sum"):
            raise ValueError(f'reduce_op={self.reduce_op!r}: give "mean" or "sum"')
        if not 0 < self.predivide_factor < float("inf"):
            raise ValueError(f"predivide_factor={self.predivide_factor}: give a number above 0")
        if not 0 <= self.order_timeout_s < float("inf"):
            raise ValueError(f"order_timeout_s={self.order_timeout_s}: give seconds, or 0 for no watch")
        if not isinstance(self.leaf_modules, (tuple, list)):
            raise ValueError(f"leaf_modules={self.leaf_modules!r}: give a tuple of classes or names")
        for name, least in (
            ("reduce_bucket_numel", 1),
            ("publish_bucket_numel", 1),
            ("persistence_threshold_numel", 0),
            ("model_persistence_numel", 0),
            ("prefetch_numel", 0),
            ("max_live_numel", 0),
            ("max_reuse_distance_numel", 0),
            ("module_granularity_numel", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: give a number of elements, or None to adapt to the model")
        for name in ("param_dtype", "communication_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not dtype.is_floating_point:
                raise ValueError(f"{name}={dtype}: give a floating-point dtype, or None")
        if self.param_dtype is not None and self.dtype_for is not None:
            raise ValueError(
                "param_dtype and dtype_for are both given: the second takes the place of the first"
            )
        if self.grad_dtype not in GRAD_DTYPES:
            raise ValueError(f"grad_dtype={self.grad_dtype}: give one of {', '.join(map(str, GRAD_DTYPES))}")
