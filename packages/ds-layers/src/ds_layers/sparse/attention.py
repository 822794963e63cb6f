"""`BlockSparseAttention`: an attention function that computes some blocks of the attention matrix."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from ds_layers.sparse import layouts
from ds_layers.sparse.blocks import block_sparse, lowest, scores_of
from ds_layers.sparse.flex import block_mask, flex_block_sparse
from ds_layers.sparse.layouts import UNIDIRECTIONAL, SparsityConfig
from ds_layers.sparse.native import is_native, native_block_sparse
from ds_layers.sparse.plan import BlockPlan, plan_blocks, token_mask

Backend = Literal["auto", "native", "blocks", "flex", "reference"]
"""What computes the blocks. "native": the kernel of ds_core, on the CPU. "blocks": torch's kernel of dense
attention over the blocks of each row. "flex": FlexAttention, on accelerators. "reference": dense attention with a mask.
"auto": native where it is, flex on accelerators, else blocks."""

_MODES: Mapping[str, type[SparsityConfig]] = {
    "dense": layouts.DenseSparsityConfig,
    "fixed": layouts.FixedSparsityConfig,
    "variable": layouts.VariableSparsityConfig,
    "bigbird": layouts.BigBirdSparsityConfig,
    "bslongformer": layouts.BSLongformerSparsityConfig,
    "local_sliding_window": layouts.LocalSlidingWindowSparsityConfig,
}


def sparsity_of(mode: str, num_heads: int, **options: Any) -> SparsityConfig:
    """Returns the pattern of a `mode` of the section `sparse_attention`. Options of other modes are ignored.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in _MODES:
        raise ValueError(f"mode {mode!r}: it must be one of {', '.join(_MODES)}")
    kind = _MODES[mode]
    known = inspect.signature(kind).parameters
    return kind(num_heads, **{name: value for name, value in options.items() if name in known})


class BlockSparseAttention:
    """An `AttentionFn` over the blocks of a pattern; any number of tokens, fewer key heads, paddings.

    In unidirectional patterns, and with `causal`, no token attends to a later one, also within a block.
    """

    def __init__(
        self, sparsity: SparsityConfig | Callable[[int], SparsityConfig], *, backend: Backend = "auto"
    ) -> None:
        """Constructs the function.

        Args:
            sparsity: the pattern, or a function from the number of heads to it.
            backend: what computes the blocks.

        Raises:
            ValueError: an unknown backend.
        """
        if backend not in ("auto", "native", "blocks", "flex", "reference"):
            raise ValueError(f"backend {backend!r}: it must be auto, native, blocks, flex or reference")
        self._sparsity, self._backend = sparsity, backend
        self._layouts: dict[tuple[int, int], tuple[SparsityConfig, Tensor]] = {}
        self._plans: dict[tuple[int, int, bool], BlockPlan] = {}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        scale: float | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionFn`.

        Args:
            padding: (batch, tokens), True or 1 for keys that count.
        """
        heads, tokens = q.shape[2], q.shape[1]
        sparsity, layout = self._layout(heads, tokens)
        causal = causal or sparsity.attention == UNIDIRECTIONAL
        missing = -tokens % sparsity.block
        added = _added(padding, q, missing, causal)
        own = [
            pad(x, (0, 0, 0, 0, 0, missing)).transpose(1, 2) if missing else x.transpose(1, 2)
            for x in (q, k, v)
        ]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out = self._compute(own, layout, sparsity.block, causal, scale, added)
        return out.transpose(1, 2)[:, :tokens]

    def for_transformers(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """The function for Transformers' registry: tensors are (batch, heads, tokens, head_dim), the mask (batch,
        tokens).

        Raises:
            ValueError: a cache of keys, or dropout of attention weights.
        """
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                f"{query.shape[2]} queries and {key.shape[2]} keys: block-sparse attention supports neither cross "
                "attention nor a cache of keys; call the model with use_cache=False"
            )
        if dropout:
            raise ValueError(
                f"attention dropout {dropout} is not supported by block-sparse attention: set it to 0"
            )
        causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
        own = (x.transpose(1, 2) for x in (query, key, value))
        return self(*own, causal=causal, scale=scaling, padding=attention_mask), None

    def density(self, heads: int, tokens: int, *, causal: bool = False) -> float:
        """Returns the share of the blocks that are computed."""
        sparsity, layout = self._layout(heads, tokens)
        return self._plan(layout, sparsity.block, causal or sparsity.attention == UNIDIRECTIONAL).density

    def _layout(self, heads: int, tokens: int) -> tuple[SparsityConfig, Tensor]:
        key = (heads, tokens)
        if key not in self._layouts:
            given = self._sparsity
            sparsity = given if isinstance(given, SparsityConfig) else given(heads)
            if sparsity.num_heads != heads:
                raise ValueError(
                    f"the pattern is for {sparsity.num_heads} heads, and the queries have {heads}"
                )
            rounded = -(-tokens // sparsity.block) * sparsity.block
            self._layouts[key] = (sparsity, sparsity.make_layout(rounded))
        return self._layouts[key]

    def _plan(self, layout: Tensor, block: int, causal: bool) -> BlockPlan:
        key = (id(layout), block, causal)
        if key not in self._plans:
            self._plans[key] = plan_blocks(layout, block, causal=causal)
        return self._plans[key]

    def _compute(
        self, own: list[Tensor], layout: Tensor, block: int, causal: bool, scale: float, added: Tensor | None
    ) -> Tensor:
        q, k, v = own
        plan = self._plan(layout, block, causal)
        backend = self._backend
        if backend == "auto":
            native = is_native(q, plan) and v.shape == k.shape
            backend = "native" if native else "blocks" if q.device.type == "cpu" else "flex"
        if backend == "native":
            return native_block_sparse(q, k, v, plan, scale=scale, padding=added)
        if backend == "blocks":
            return block_sparse(q, k, v, plan, scale=scale, padding=added)
        if backend == "flex":
            mask = block_mask(layout.to(q.device), block, causal=causal, padding=added)
            return flex_block_sparse(q, k, v, mask, scale=scale, compiled=q.device.type != "cpu")
        dense = scores_of(token_mask(layout, block, causal=causal).to(q.device), q.dtype)
        mask = dense[None] if added is None else torch.minimum(dense, added[:, None, None])
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def _added(padding: Tensor | None, q: Tensor, missing: int, causal: bool) -> Tensor | None:
    """Returns what is added to the scores of each key: (batch, tokens in whole blocks); None if all count."""
    if padding is None and (not missing or causal):
        return None  # real tokens do not attend to what was added at the end
    counts = torch.ones(q.shape[:2], device=q.device) if padding is None else padding
    counts = pad(counts.to(torch.bool), (0, missing), value=False)
    return scores_of(counts, q.dtype)


class SparseSelfAttention(nn.Module):
    """Block-sparse attention of queries, keys and values (batch, heads, tokens, head_dim), with DeepSpeed's arguments.

    Args:
        sparsity_config: the pattern. Default: `FixedSparsityConfig` for 4 heads.
        key_padding_mask_mode: "add": the mask is 0 for keys that count, and a large negative number for others. "mul":
            it is 1 for keys that count, and 0 for others.
        attn_mask_mode: the same for `attn_mask`.
        max_seq_length: accepted without effect: layouts are made for the tokens that come.
    """

    def __init__(
        self,
        sparsity_config: SparsityConfig | None = None,
        key_padding_mask_mode: str = "add",
        attn_mask_mode: str = "mul",
        max_seq_length: int = 2048,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        for name, mode in (
            ("key_padding_mask_mode", key_padding_mask_mode),
            ("attn_mask_mode", attn_mask_mode),
        ):
            if mode not in ("add", "mul"):
                raise ValueError(f"{name} {mode!r}: it must be 'add' or 'mul'")
        self.sparsity_config = sparsity_config or layouts.FixedSparsityConfig(num_heads=4)
        self.key_padding_mask_mode, self.attn_mask_mode = key_padding_mask_mode, attn_mask_mode
        self._attention = BlockSparseAttention(self.sparsity_config, backend=backend)

    def get_layout(self, seq_length: int) -> Tensor:
        """Returns the layout for a number of tokens."""
        return self.sparsity_config.make_layout(seq_length)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpe: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns (batch, heads, tokens, head_dim).

        Args:
            rpe: added to the scores, such as relative positions: (tokens, tokens), or with (batch and) heads before.
                With it or `attn_mask`, the whole attention matrix is computed.
            key_padding_mask: (batch, tokens).
            attn_mask: (tokens, tokens).

        Raises:
            ValueError: a number of tokens that is not a multiple of the block size.
        """
        tokens, block = query.shape[2], self.sparsity_config.block
        if tokens % block:
            raise ValueError(
                f"{tokens} tokens are not a multiple of the block size {block}: pad them "
                "(SparseAttentionUtils.pad_to_block_size)"
            )
        counts = None
        if key_padding_mask is not None:
            flat = key_padding_mask.reshape(query.shape[0], tokens)
            counts = flat >= 0 if self.key_padding_mask_mode == "add" else flat != 0
        if rpe is None and attn_mask is None:
            out = self._attention(*(x.transpose(1, 2) for x in (query, key, value)), padding=counts)
            return out.transpose(1, 2)
        causal = self.sparsity_config.attention == UNIDIRECTIONAL
        allowed = token_mask(self.get_layout(tokens), block, causal=causal).to(query.device)[None]
        if counts is not None:
            allowed = allowed & counts[:, None, None]
        scores = scores_of(allowed, query.dtype)
        if attn_mask is not None and self.attn_mask_mode == "mul":
            scores = scores.masked_fill(attn_mask == 0, lowest(query.dtype))
        elif attn_mask is not None:
            scores = (scores + attn_mask).clamp(min=lowest(query.dtype))
        if rpe is not None:
            scores = scores + rpe
        return scaled_dot_product_attention(query, key, value, attn_mask=scores.to(query.dtype))
