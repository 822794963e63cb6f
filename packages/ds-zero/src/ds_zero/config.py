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
    """Options of `ds_zero.shard`. The defaults adapt to the model and the stage."""

    accumulation: Accumulation | None = None
    """How gradients of several micro-batches are accumulated: "local" adds whole gradients in fp32 on each rank and
    reduces them once, at the accumulation boundary; "sharded" reduces every micro-batch and adds shards. None: local
    at stages 0 and 1, sharded at stages 2 and 3. The two differ in the last bits of sums; with the same setting all
    stages are bitwise equal.
    """

    accumulation_steps: int | None = None
    """Number of backwards per optimizer step, for local accumulation, whose reduction overlaps with the last
    backward. None: as many as in the previous step (the first step reduces inside `step`). A wrong number only loses
    the overlap: gradients that are not reduced yet are reduced inside `step`.
    """

    param_dtype: torch.dtype | None = None
    """Compute dtype of floating-point parameters. The fp32 masters get the values before the cast. None: unchanged."""

    dtype_for: Callable[[str, nn.Parameter], torch.dtype | None] | None = None
    """Function from a parameter's name to its compute dtype; None keeps the dtype of the parameter. Replaces
    `param_dtype`, for example to keep some modules in fp32.
    """

    grad_dtype: torch.dtype = torch.float32
    """Dtype in which gradients are accumulated over micro-batches and kept until the step. A 16-bit dtype halves that
    memory and rounds after every addition. Sums over ranks are still computed in fp32 if the collective supports it.
    """

    reduce_bucket_numel: int | None = None
    """Maximum number of elements in a bucket (a larger parameter has its own bucket), for stages 0 to 2 and for whole
    parameters at stage 3. None: an eighth of the model, between 2**18 and 2**25.
    """

    publish_bucket_numel: int | None = None
    """Stages 1 and 2: maximum number of elements, over all ranks, in one all-gather of updated parameters. None: a
    whole bucket. Smaller messages need a copy, but reduce the buffers of the collective.
    """

    persistence_threshold_numel: int | None = None
    """Stage 3: parameters with at most this number of elements stay whole on every rank. None: 1e5, or the largest
    smaller number with which at most 2% of the model stay whole.
    """

    model_persistence_numel: int | None = None
    """Stage 3: maximum total number of elements that stay whole by the threshold above. None: no limit."""

    layout: Literal["flat", "whole"] | None = None
    """How masters and optimizer states are divided: "flat" splits tensors evenly among the ranks; "whole" assigns
    every tensor to one rank, for optimizers that need whole tensors. None: what the optimizer needs, for each of its
    groups; [Note: three kinds of optimizer].
    """

    secondary_ranks: int = 1
    """Stage 3: each group of this number of consecutive ranks keeps a second copy of the parameters, in compute dtype
    and sharded within the group. Only the first gather after a step then communicates outside of the group. 1: no
    second copy. [Note: secondary shards]
    """

    overlap_reduce: bool | None = None
    """Whether backward continues while a bucket is reduced. False: it waits for every bucket. None: True."""

    reduce_scatter: bool = True
    """Stages 1 to 3: whether buckets are reduced by reduce-scatter, so that a rank receives only its slice. False: by
    all-reduce, which sends twice the bytes and gives the same values.
    """

    ordered_reduction: bool | None = None
    """Whether sums over ranks are computed in the order of a fixed binary tree, [Note: ordered reduction]. False: in
    the order of the backend. None: ordered on the CPU, where it is also faster. No effect if `comm` is passed.
    """

    rank_invariant: bool = False
    """Makes training with the same micro-batches bitwise equal on 1, 2, 4, 8, ... ranks, [Note: tree over
    micro-batches]. It uses the ordered reduction, sharded accumulation, and memory for up to log2(micro-batches per
    rank) - 1 more shards of fp32 gradients. Loss weights and numbers of micro-batches must be powers of two, and rank
    r of W must process the micro-batches r, W + r, 2W + r, ...
    """

    communication_dtype: torch.dtype | None = None
    """Dtype in which gradients are sent. The ordered reduction sums in fp32, the backend's reduction in this dtype.
    None: the dtype in which they were accumulated.
    """

    reduce_op: Literal["mean", "sum"] = "mean"
    """Whether gradients are averaged or summed over ranks."""

    sparse_gradients: bool = False
    """Stage 0: whether only the nonzero rows of gradients of `nn.Embedding` and `nn.EmbeddingBag` are sent, if these
    are fewer bytes. The result has the same bits. Optimizers get dense gradients. [Note: gradients by rows]
    """

    predivide_factor: float = 1.0
    """Divisor of gradients before they are sent; sums are multiplied by it afterwards. It prevents overflow in 16-bit
    dtypes. [Note: predivided mean]
    """

    ignore_unused: bool = True
    """Whether parameters may have no gradient. False: the step raises an error on every rank that names the
    parameters which some rank did not use.
    """

    prefetch: bool = True
    """Stage 3: whether the next module, in the order of the previous pass, is gathered while the current one
    computes.
    """

    prefetch_numel: int | None = None
    """Stage 3: further modules are prefetched as long as fewer elements than this are being gathered. None: only the
    next module; the next two if parameters are loaded from a disk. 0: none.
    """

    max_live_numel: int | None = None
    """Stage 3: maximum number of gathered elements. Above it, no module is prefetched or kept for reuse; the module
    that runs is always gathered. None: no limit. By default few modules are prefetched or kept.
    """

    max_reuse_distance_numel: int | None = None
    """Stage 3: a module stays gathered if at most this number of other elements are used before its next use. None:
    0, which keeps only parameters that the next module uses again.
    """

    leaf_modules: tuple[type[nn.Module] | str, ...] = ()
    """Stage 3: modules (classes, class names or module names) that are gathered as a whole, because ranks use
    different parts of them. Mixtures of experts are detected without it. [Note: leaf modules]
    """

    module_granularity_numel: int = 0
    """Stage 3: a module whose submodules have at most this number of parameter elements on average is gathered as a
    whole. 0: blocks are, whatever their size.
    """

    order_timeout_s: float = 30.0
    """Seconds without progress after which ranks that wait for each other in different modules raise
    `RankOrderError`; four times as long if they ran the same modules so far. 0: no check. [Note: detection of stalled
    ranks]
    """

    overlap_publish: bool = False
    """Stages 1 and 2: whether `step` returns while updated parameters are still being gathered. Every module of the
    model, `state_dict`, `load_state_dict` and the functions of ds_zero wait for them. Do not set it if your code
    reads parameters in another way right after a step (`for p in model.parameters()`). Call `ds_zero.destroy(model)`
    before you drop the model: messages of the last step may still be under way.
    """

    overlap_step: bool = False
    """Whether buckets are updated during the last backward before a step, as soon as their gradients are final. If the
    step would differ (by clipping, an overflow, another learning rate), they are taken back and updated in the step, so
    that the result has the same bits. It needs an optimizer of ds_offload, parameters in 16 bits, and to know which
    backward is the last one: from `accumulation_steps`, from the previous step, or from `no_sync` around the others.
    Until the step, values of optimizer entries and states that are read past ds_zero may be those after it.
    [Note: early steps]
    """

    undo_bytes: int | None = None
    """With `overlap_step`: maximum bytes of memory for old and new values, until it is known whether an update stays.
    Values on a disk need none. Buckets for which no bytes are left are updated in the step. None: no limit.
    """

    checksums: bool = False
    """Whether each rank keeps checksums of its masters, optimizer states and reduced gradients, and compares them when
    the values are read again. A difference raises `ChecksumError` on every rank. [Note: checksums of shards]
    """

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
        if self.undo_bytes is not None and self.undo_bytes < 0:
            raise ValueError(f"undo_bytes={self.undo_bytes}: give a number of bytes, or None for no limit")
        if self.overlap_step and self.checksums:
            raise ValueError(
                "overlap_step and checksums are both True: checksums of shards are compared in one pass over all of "
                "them, before any is updated; remove one of the two"
            )
        for name in ("param_dtype", "communication_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not dtype.is_floating_point:
                raise ValueError(f"{name}={dtype}: give a floating-point dtype, or None")
        if self.param_dtype is not None and self.dtype_for is not None:
            raise ValueError(
                "param_dtype and dtype_for are both given: remove param_dtype, because dtype_for replaces it"
            )
        if self.grad_dtype not in GRAD_DTYPES:
            raise ValueError(f"grad_dtype={self.grad_dtype}: give one of {', '.join(map(str, GRAD_DTYPES))}")
