"""How many floating-point operations one torch operation does, from the shapes of what goes in and comes out.

A multiply-accumulate (MAC) is one multiplication and one addition, so 2 FLOPs. Matrix products, convolutions and
attention are counted in MACs; attention with a causal mask is counted whole, as is usual, although kernels skip half of
it. Everything else is counted in FLOPs by element: one for an element-wise operation, `PER_ELEMENT` for the others.
Copies, casts, comparisons, indexing and random numbers are no floating-point operations.

The formulas of products and convolutions, and of their backward, are those of `torch.utils.flop_counter`; this module
adds operations that it lacks (grouped products, attention on a CPU, grouped-query attention, recurrent layers, fused
encoder layers of inference) and the element-wise ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry


class Work(NamedTuple):
    """Operations of one call, or of many together."""

    macs: int = 0
    """Multiply-accumulates of matrix products, convolutions and attention."""
    flops: int = 0
    """Floating-point operations: two for each multiply-accumulate, and those of everything else."""

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        # A step adds thousands: a tuple is made in a fraction of the time of a frozen dataclass.
        return Work(self.macs + other.macs, self.flops + other.flops)


NONE = Work()
Formula = Callable[[Sequence[Any], Mapping[str, Any], Any], Work]
"""From positional arguments, keyword arguments and result of an operation to its work."""


def products(macs: int) -> Work:
    """The work of `macs` multiply-accumulates."""
    return Work(macs, 2 * macs)


def elements(value: Any) -> int:
    """Number of elements of the floating-point tensors in `value`, a tensor or a sequence of them."""
    if isinstance(value, Tensor):
        return value.numel() if value.is_floating_point() or value.is_complex() else 0
    if isinstance(value, (list, tuple)):
        return sum(elements(item) for item in value)
    return 0


# FLOPs for an element of the first argument. A function such as exp counts as one.
PER_ELEMENT: Mapping[str, int] = {
    "_softmax": 4,  # subtract the maximum, exp, sum, divide
    "_log_softmax": 4,
    "_safe_softmax": 4,
    "_softmax_backward_data": 4,  # multiply, sum, subtract, multiply
    "_log_softmax_backward_data": 4,
    "logsumexp": 4,
    "native_layer_norm": 7,  # mean 1, variance 2, normalise 2, weight and bias 2
    "native_layer_norm_backward": 14,
    "_fused_rms_norm": 4,  # square, sum, normalise, weight
    "_fused_rms_norm_backward": 8,
    "native_group_norm": 7,
    "native_group_norm_backward": 14,
    "native_batch_norm": 7,
    "_native_batch_norm_legit": 7,
    "_native_batch_norm_legit_no_training": 2,  # one factor and one summand, from running statistics
    "_batch_norm_with_update": 7,
    "cudnn_batch_norm": 7,
    "native_batch_norm_backward": 14,
    "batch_norm_backward": 14,
    "cudnn_batch_norm_backward": 14,
    "sum": 1,
    "mean": 1,
    "prod": 1,
    "amax": 1,
    "amin": 1,
    "max": 1,
    "min": 1,
    "cumsum": 1,
    "cumprod": 1,
    "var": 3,
    "std": 3,
    "var_mean": 3,
    "std_mean": 3,
    "linalg_vector_norm": 2,
    "norm": 2,
    "nll_loss_forward": 1,
    "nll_loss_backward": 1,
    "nll_loss2d_forward": 1,
    "nll_loss2d_backward": 1,
    "mse_loss": 3,  # subtract, square, sum
    "mse_loss_backward": 2,
    "smooth_l1_loss": 3,
    "smooth_l1_loss_backward": 2,
    "huber_loss": 3,
    "huber_loss_backward": 2,
    "binary_cross_entropy": 4,
    "binary_cross_entropy_backward": 4,
    "_adaptive_avg_pool2d": 1,
    "_adaptive_avg_pool3d": 1,
    "adaptive_max_pool2d": 1,
    "upsample_bilinear2d": 1,
    "index_add": 1,
    "scatter_add": 1,
    "embedding_dense_backward": 1,
    "_embedding_bag": 1,
}
# Element-wise for torch, but nothing is computed.
MOVES = frozenset(
    ("clone", "copy", "copy_", "_to_copy", "fill", "fill_", "zero_", "where", "masked_fill")
) | frozenset(
    (
        "masked_fill_",
        "contiguous",
        "alias",
        "lift_fresh",
        "nan_to_num",
        "bernoulli",
        "bernoulli_",
        "native_dropout",
    )
)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> int:
    """MACs of attention over (..., heads, tokens, head size): scores, and their product with the values. With grouped
    queries `k` and `v` have fewer heads, and each is used several times.
    """
    return math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_forward(args: Sequence[Any], _: Mapping[str, Any], __: Any) -> Work:
    return products(_attention(*args[:3]))


def _attention_backward(args: Sequence[Any], _: Mapping[str, Any], __: Any) -> Work:
    # (gradient, q, k, v): scores again, gradients of values, of probabilities, of queries and of keys.
    q, k, v = args[1:4]
    rows = math.prod(q.shape[:-1]) * k.shape[-2]
    return products(rows * (3 * q.shape[-1] + 2 * v.shape[-1]))


def _linear(args: Sequence[Any], _: Mapping[str, Any], out: Tensor) -> Work:
    return products(out.numel() * args[1].shape[-1])


def _dot(args: Sequence[Any], _: Mapping[str, Any], __: Any) -> Work:
    return products(int(args[0].numel()))


def _matrix_vector(args: Sequence[Any], _: Mapping[str, Any], __: Any) -> Work:
    return products(int(args[-2].numel()))  # mv(matrix, vector), addmv(input, matrix, vector)


def _add_products(args: Sequence[Any], _: Mapping[str, Any], __: Any) -> Work:
    a, b = args[1:3]  # addbmm(input, batch x n x k, batch x k x m)
    return products(int(a.numel()) * b.shape[-1])


def _grouped(args: Sequence[Any], _: Mapping[str, Any], __: Any) -> Work:
    """Rows (tokens) that belong to groups, times one matrix for each group; or the gradient of those matrices."""
    a, b = args[:2]
    if a.dim() == 3 and b.dim() == 2:  # groups x n x k, k x columns of all groups
        return products(a.shape[1] * a.shape[2] * b.shape[1])
    return products(int(a.numel()) * b.shape[-1])


def _recurrent(args: Sequence[Any], _: Mapping[str, Any], __: Any) -> Work:
    # mkldnn_rnn_layer(input of tokens x batch x features, input weights, hidden weights, ...)
    tokens, batch = args[0].shape[:2]
    return products(tokens * batch * (int(args[1].numel()) + int(args[2].numel())))


def _cudnn_recurrent(args: Sequence[Any], _: Mapping[str, Any], __: Any) -> Work:
    tokens, batch = args[0].shape[:2]
    return products(tokens * batch * sum(int(w.numel()) for w in args[1] if w.dim() > 1))


def _heads(x: Tensor, embed: int) -> int:
    """MACs of self-attention with its four projections, over (batch, tokens, embed)."""
    batch, tokens = x.shape[:2]
    return batch * tokens * (4 * embed * embed + 2 * tokens * embed)


def _fused_attention_layer(args: Sequence[Any], _: Mapping[str, Any], __: Any) -> Work:
    return products(_heads(args[0], args[3]))


def _fused_encoder_layer(args: Sequence[Any], _: Mapping[str, Any], __: Any) -> Work:
    x, embed = args[0], args[1]
    hidden = args[14].shape[0]  # ffn_weight_1
    return products(_heads(x, embed) + 2 * x.shape[0] * x.shape[1] * embed * hidden)


def _pool(args: Sequence[Any], _: Mapping[str, Any], out: Any) -> Work:
    window = args[1] if isinstance(args[1], (list, tuple)) else (args[1],)
    return Work(0, math.prod(window) * elements(out))


def _product(args: Sequence[Any], _: Mapping[str, Any], out: Any) -> Work:
    return products(out.numel() * args[0].shape[-1])


def _product_with_sum(args: Sequence[Any], _: Mapping[str, Any], out: Any) -> Work:
    return products(out.numel() * args[1].shape[-1])


FORMULAS: Mapping[str, Formula] = {
    # torch has formulas for these, too, but takes some hundred microseconds for each call.
    "mm": _product,
    "bmm": _product,
    "addmm": _product_with_sum,
    "baddbmm": _product_with_sum,
    "linear": _linear,
    "dot": _dot,
    "vdot": _dot,
    "mv": _matrix_vector,
    "addmv": _matrix_vector,
    "addbmm": _add_products,
    "_grouped_mm": _grouped,
    "_scaled_grouped_mm": _grouped,
    "mkldnn_rnn_layer": _recurrent,
    "_cudnn_rnn": _cudnn_recurrent,
    "miopen_rnn": _cudnn_recurrent,
    "_native_multi_head_attention": _fused_attention_layer,
    "_transformer_encoder_layer_fwd": _fused_encoder_layer,
    "max_pool1d_with_indices": _pool,
    "max_pool2d_with_indices": _pool,
    "max_pool3d_with_indices": _pool,
    "avg_pool2d": _pool,
    "avg_pool3d": _pool,
    **dict.fromkeys(
        (
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention_forward,
    ),
    **dict.fromkeys(
        (
            "_scaled_dot_product_efficient_attention_backward",
            "_scaled_dot_product_flash_attention_backward",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
            "_scaled_dot_product_cudnn_attention_backward",
            "_scaled_dot_product_fused_attention_overrideable_backward",
        ),
        _attention_backward,
    ),
}


class Formulas:
    """The formulas of one profile: the ones of this module, and others for operations of your own.

    Args:
        own: by the name of an operation as `namespace::name`, such as "mylib::attention".
    """

    def __init__(self, own: Mapping[str, Formula] | None = None) -> None:
        self._own = dict(own or {})
        self._found: dict[Any, Formula | None] = {}
        self.unknown: dict[str, int] = {}
        """Calls of operations outside of torch's own that have no formula, by name: their work is not counted."""

    def of(self, function: Any) -> Formula | None:
        """The formula of the torch operation `function`. None: it is a composite of others, which have formulas. Found
        once for each operation, because a training step has thousands of calls.
        """
        if function not in self._found:
            self._found[function] = self._find(function)
        return self._found[function]

    def _find(self, function: Any) -> Formula | None:
        name = str(function.name()).split(".")[0]
        if name in self._own:
            return self._own[name]
        namespace, _, short = name.partition("::")
        if namespace == "aten" and short in FORMULAS:
            return FORMULAS[short]
        if function._overloadpacket in flop_registry:
            return _of_torch(flop_registry[function._overloadpacket])
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            return None
        if namespace != "aten":
            return nothing if namespace in _SILENT else self._note(name)
        base = short[:-1] if short.endswith("_") and not short.startswith("__") else short
        if base in PER_ELEMENT:
            return _per_element(PER_ELEMENT[base])
        return _elementwise if torch.Tag.pointwise in function.tags and short not in MOVES else nothing

    def _note(self, name: str) -> Formula:
        def note(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Work:
            self.unknown[name] = self.unknown.get(name, 0) + 1
            return NONE

        return note


# Namespaces whose operations compute nothing: bookkeeping and messages.
_SILENT = frozenset(("prim", "prims", "profiler", "c10d", "_c10d_functional", "_dtensor"))


def nothing(_: Sequence[Any], __: Mapping[str, Any], ___: Any) -> Work:
    """The formula of operations that compute nothing, such as views."""
    return NONE


def _elementwise(_: Sequence[Any], __: Mapping[str, Any], out: Any) -> Work:
    return Work(0, elements(out))


def _per_element(flops: int) -> Formula:
    return lambda args, kwargs, out: Work(0, flops * elements(args[0])) if args else NONE


def _of_torch(flops_of: Callable[..., Any]) -> Formula:
    def work(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Work:
        flops = int(flops_of(*args, **kwargs, out_val=out))
        return Work(flops // 2, flops)

    return work
