"""`parallelize`: cuts the layers of a model among tensor-parallel ranks, in place.

[Note: what is equal on all tensor-parallel ranks]
Parameters that are not cut must stay equal bit by bit, with no message to keep them so. Their gradients are: every
gradient outside of the cut regions is computed from all-reduced values, which have the same bits on every rank.
Exceptions are parameters that a rank uses for its tokens or heads only; the gradients of those are all-reduced by a
hook. Random numbers outside of the cut regions, such as dropout, must be the same: ranks need the same seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ds_layers.sequence.ulysses import Group, process_group
from ds_layers.tensor import _registry
from ds_layers.tensor.collectives import joined_tokens, scattered_tokens
from ds_layers.tensor.cut import Cut
from ds_layers.tensor.layers import (
    ColumnParallelLinear,
    HeadParallelEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from ds_layers.tensor.plan import Plan, adjust_counts, check_heads, infer_plan, styles_of


def parallelize(
    model: nn.Module,
    group: Group | None = None,
    *,
    plan: Plan | None = None,
    sequence_parallel: bool = False,
    vocabulary: bool = False,
) -> nn.Module:
    """Cuts the layers of a model among ranks; the model computes the same as before, from the same inputs on all ranks.

    Layers are replaced, and their parameters stay the same objects under the same names, with a part of their values.
    All ranks get rank 0's values. Collective.

    Args:
        group: the tensor-parallel ranks. Default: all ranks.
        plan: pattern of module names -> style (ds_layers.tensor.plan). Default: the `tp_plan` of a model of
            Transformers, or the plan of its family.
        sequence_parallel: between cut layers, each rank has only some tokens: norms and residuals are computed once,
            in 1 / size of the memory. The number of tokens must be a multiple of the ranks. For models of Transformers.
        vocabulary: whether the output layer is cut, if the plan does not say so.

    Returns:
        `model`.

    Raises:
        ValueError: no plan, an unknown style, or sizes that the ranks do not divide. Nothing has been changed then.
    """
    ranks = process_group(group)
    if ranks is None:
        return model
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has DTensor parameters: it is cut already, and is not cut again. Use "
            "ds_layers.tensor.localize for a model that Transformers has cut"
        )
    if any(_registry.cut_of("", p) is not None for p in model.parameters()):
        raise ValueError(f"{type(model).__name__} is cut already, and is not cut again")
    styles = styles_of(model, plan if plan is not None else infer_plan(model, vocabulary=vocabulary))
    check_heads(model, ranks.size())
    cuts = _cuts(model, styles, ranks)
    layers = _layers_with(model, styles) if sequence_parallel else None
    parents = _parents(model, styles, layers)
    _share_values(model, ranks)
    inside = set() if layers is None else {id(module) for module in layers.modules()}
    for name, (style, _) in styles.items():
        divided = id(model.get_submodule(name)) in inside
        _replace(model, name, style, cuts, ranks, divided_tokens=divided)
    adjust_counts(model, set(styles), ranks.size())
    if layers is not None:
        summed = [n for n, (style, _) in styles.items() if style == "summed"]
        known = {id(p) for n in summed for p in model.get_submodule(n).parameters()}
        _divide_tokens(layers, ranks, known)
        for name in sorted(parents):
            _join_tokens(model.get_submodule(name), ranks)
    return model


def _cuts(
    model: nn.Module, styles: dict[str, tuple[str, int]], group: dist.ProcessGroup
) -> dict[nn.Parameter, Cut]:
    """Returns the cut of each parameter, without changing anything."""
    cuts: dict[nn.Parameter, Cut] = {}
    for name, (style, blocks) in styles.items():
        module = model.get_submodule(name)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if style == "summed":
            continue
        transposed = _is_transposed(module)
        if not isinstance(weight, nn.Parameter) or not (
            isinstance(module, nn.Embedding)
            if style in ("vocabulary", "heads")
            else isinstance(module, nn.Linear) or transposed
        ):
            raise ValueError(
                f"style {style!r} of {name!r}: {type(module).__name__} cannot be cut so; column and row are for Linear "
                "and Conv1D, vocabulary and heads for Embedding"
            )
        by_output = style not in ("row", "heads")
        try:
            cut = Cut(
                shape=tuple(weight.shape),
                dim=int(by_output == transposed),
                index=group.rank(),
                size=group.size(),
                blocks=blocks,
            )
            if by_output and isinstance(bias, nn.Parameter):
                cuts[bias] = Cut(
                    shape=tuple(bias.shape), dim=0, index=group.rank(), size=group.size(), blocks=blocks
                )
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
        if cuts.setdefault(weight, cut) != cut:
            raise ValueError(f"{name!r} shares its weight with a layer that the plan cuts differently")
    _check_ties(model, styles, cuts)
    return cuts


def _check_ties(model: nn.Module, styles: dict[str, tuple[str, int]], cuts: dict[nn.Parameter, Cut]) -> None:
    """Adds embeddings that share a cut weight to the plan."""
    for name, module in model.named_modules():
        for param in module.parameters(recurse=False):
            if param in cuts and name not in styles:
                if not isinstance(module, nn.Embedding) or cuts[param].dim != 0:
                    raise ValueError(
                        f"{name!r} ({type(module).__name__}) shares a weight that the plan cuts: add it to the plan"
                    )
                styles[name] = ("vocabulary", 1)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.Linear)


@torch.no_grad()
def _share_values(model: nn.Module, group: dist.ProcessGroup) -> None:
    tensors: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    for tensor in tensors:
        if not tensor.is_meta:
            source = dist.get_process_group_ranks(group)[0]
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, source, group=group)
            tensor.detach().copy_(whole)


def _replace(
    model: nn.Module,
    name: str,
    style: str,
    cuts: dict[nn.Parameter, Cut],
    group: dist.ProcessGroup,
    *,
    divided_tokens: bool,
) -> None:
    module = model.get_submodule(name)
    if style == "summed":
        for param in module.parameters():
            _sum_gradient(param, group)
        return
    for param in module.parameters(recurse=False):
        cut = cuts.get(param)
        if cut is not None and _registry.cut_of("", param) is None:
            param.data = cut.of(param.detach())
            _registry.note(param, cut)
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, nn.Parameter)
    bias = bias if isinstance(bias, nn.Parameter) else None
    transposed, cut = _is_transposed(module), cuts[weight]
    made: nn.Module
    if style == "vocabulary":
        made = VocabParallelEmbedding(weight, group, cut, module.padding_idx)  # type: ignore[arg-type]
    elif style == "heads":
        made = HeadParallelEmbedding(weight)
    elif style == "row":
        made = RowParallelLinear(weight, bias, group, transposed=transposed, divided_tokens=divided_tokens)
        if bias is not None and divided_tokens:
            _sum_gradient(bias, group)
    else:
        made = ColumnParallelLinear(
            weight,
            bias,
            group,
            transposed=transposed,
            gathered=cut if style == "column_gathered" else None,
            joined_before=divided_tokens,
        )
    made.train(module.training)
    model.set_submodule(name, made)


def _sum_gradient(param: nn.Parameter, group: dist.ProcessGroup) -> None:
    """Adds the gradients of all ranks, [Note: what is equal on all tensor-parallel ranks]."""
    if not param.requires_grad:
        return

    def add(grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    param.register_hook(add)


def _layers_with(model: nn.Module, styles: dict[str, tuple[str, int]]) -> nn.ModuleList:
    """Returns the list of layers that contains the cut ones."""
    for name, module in model.named_modules():
        inside = f"{name}.0." if name else "0."
        if isinstance(module, nn.ModuleList) and len(module) and any(n.startswith(inside) for n in styles):
            return module
    raise ValueError(
        f"sequence_parallel: {type(model).__name__} has no ModuleList of layers that the plan cuts; set it to False"
    )


def _parents(model: nn.Module, styles: dict[str, tuple[str, int]], layers: nn.ModuleList | None) -> set[str]:
    """Returns the names of the modules inside of `layers`, attention and MLPs, that contain column-parallel layers."""
    if layers is None:
        return set()
    inside = {id(module) for module in layers.modules()}
    columns = [
        n for n, (style, _) in styles.items() if style == "column" and id(model.get_submodule(n)) in inside
    ]
    parents = {name.rpartition(".")[0] for name in columns}
    for name in parents:
        if any(model.get_submodule(name) is layer for layer in layers):
            raise ValueError(
                f"sequence_parallel: the layers that {name!r} cuts are not in modules of their own, such as attention "
                "and MLP; set it to False"
            )
    return parents


def _join_tokens(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Joins the tokens of the first argument of a module, which computes different heads or features on each rank."""

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (joined_tokens(args[0], group, partial=True), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": joined_tokens(kwargs["hidden_states"], group, partial=True)}

    module.register_forward_pre_hook(before, with_kwargs=True)


def _divide_tokens(layers: nn.ModuleList, group: dist.ProcessGroup, summed: set[int]) -> None:
    """Divides hidden states before the first layer and joins them after the last. `summed`: identities of parameters
    whose gradients are added already.
    """

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (scattered_tokens(args[0], group, partial=False), *args[1:]), kwargs
        hidden = scattered_tokens(kwargs["hidden_states"], group, partial=False)
        return args, {**kwargs, "hidden_states": hidden}

    def after(_: nn.Module, __: object, output: object) -> object:
        if isinstance(output, tuple):
            return (joined_tokens(output[0], group, partial=False), *output[1:])
        assert isinstance(output, Tensor)
        return joined_tokens(output, group, partial=False)

    layers[0].register_forward_pre_hook(before, with_kwargs=True)
    layers[-1].register_forward_hook(after)
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                continue
            for param in module.parameters(recurse=False):
                if id(param) not in summed:
                    _sum_gradient(param, group)
