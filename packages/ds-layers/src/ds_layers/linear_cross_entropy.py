"""Cross entropy of a linear layer's outputs, a part of the tokens at a time: all logits never exist together.

For hidden states h, weight W and labels y, logits are z = h W^T + b, and the loss of a token is
logsumexp(z) - z_y. Its gradient with respect to z is softmax(z) - onehot(y), which needs nothing but z. So forward
computes the gradients of each part right after its loss and drops its logits; backward multiplies what was kept,
gradients of the sizes of h, W and b, by the gradient of the loss. There are as many matrix products as without parts.

Source: Hsu et al., Liger Kernel (arXiv:2410.10989), section 3.2, for gradients in forward.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

_DEFAULT_PART_BYTES = 64 * 2**20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    part_tokens: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Returns the mean or sum of `cross_entropy(linear(hidden, weight, bias), labels)`, in fp32 (fp64 for fp64).

    The mean is over tokens that have a label; it is 0 if there are none. Sums of gradients of the weight are fp32.

    Args:
        hidden: (..., features).
        weight: (vocabulary, features), as in `nn.Linear`.
        labels: (...), each token's label.
        bias: (vocabulary).
        part_tokens: number of tokens whose logits exist together. Default: 64 MiB of logits.
        ignore_index: the label of tokens that do not count.

    Raises:
        ValueError: shapes that do not fit, fewer than 1 token in a part, or an unknown reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: it must be 'mean' or 'sum'")
    if hidden.shape[:-1] != labels.shape or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}: they must be "
            "(..., features), (vocabulary, features) and (...)"
        )
    part_tokens = part_tokens if part_tokens is not None else _default_part(weight.shape[0])
    if part_tokens < 1:
        raise ValueError(f"part_tokens is {part_tokens}: it must be at least 1")
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        flat, weight, bias = flat.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(flat, weight, bias, flat_labels, part_tokens, ignore_index)  # type: ignore[no-untyped-call]
    return total / (flat_labels != ignore_index).sum().clamp(min=1) if reduction == "mean" else total


def _default_part(vocabulary: int) -> int:
    return max(1, _DEFAULT_PART_BYTES // (4 * vocabulary))


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses; its gradients are computed in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        part_tokens: int,
        ignore_index: int,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if needs_bias and bias is not None else None
        for begin in range(0, hidden.shape[0], part_tokens):
            rows = slice(begin, begin + part_tokens)
            loss, d_logits = _part(
                hidden[rows], weight, bias, labels[rows], ignore_index, any(ctx.needs_input_grad)
            )
            total += loss
            if d_logits is None:
                continue
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if d_weight is not None:
                if d_weight.dtype == hidden.dtype:
                    d_weight.addmm_(d_logits.T, hidden[rows])
                else:
                    d_weight += d_logits.T @ hidden[rows]
        kept = (d_hidden, None if d_weight is None else d_weight.to(weight.dtype), d_bias)
        ctx.save_for_backward(*kept)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        scale = grads[0]
        return (
            None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype),
            None if d_weight is None else d_weight * scale.to(d_weight.dtype),
            None if d_bias is None else (d_bias * scale).to(ctx.bias_dtype),
            None,
            None,
            None,
        )


def _part(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns the sum of the losses of some tokens, and its gradient with respect to their logits."""
    logits = linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = labels != ignore_index
    index = labels.where(counts, 0).unsqueeze(1)
    norm = logits.logsumexp(1, keepdim=True)
    loss = ((norm - logits.gather(1, index)).squeeze(1) * counts).sum()
    if not with_gradient:
        return loss, None
    # In place: the logits are not needed any more.
    d_logits = logits.sub_(norm).exp_()
    d_logits.scatter_add_(1, index, torch.full_like(norm, -1.0))
    return loss, d_logits.mul_(counts.unsqueeze(1))
