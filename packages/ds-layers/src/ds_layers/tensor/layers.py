"""Linear layers and embeddings of which each tensor-parallel rank holds a part.

They take the parameters of the layer that they replace: the same objects, with a part of the values. `transposed`
stands for GPT-2's `Conv1D`, whose weight is (in, out).
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from ds_layers.tensor.collectives import (
    copied,
    joined_features,
    scattered_tokens,
    summed,
)
from ds_layers.tensor.cut import Cut


class ColumnParallelLinear(nn.Module):
    """A linear layer of which each rank computes some outputs, from whole inputs."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        group: dist.ProcessGroup,
        *,
        transposed: bool = False,
        gathered: Cut | None = None,
        joined_before: bool = False,
    ) -> None:
        """Wraps parameters that are cut already.

        Args:
            weight: (this rank's outputs, inputs); (inputs, outputs) if `transposed`.
            bias: (this rank's outputs).
            gathered: the cut of the outputs, if all ranks are to get all of them.
            joined_before: whether the tokens of the inputs are joined by the module that contains the layer, whose
                backward then adds the gradients of all ranks.
        """
        super().__init__()
        self.weight = weight
        self.bias = bias
        self._group, self._transposed, self._gathered = group, transposed, gathered
        self._joined = joined_before

    @property
    def in_features(self) -> int:
        return self.weight.shape[0 if self._transposed else 1]

    @property
    def out_features(self) -> int:
        """This rank's outputs."""
        return self.weight.shape[1 if self._transposed else 0]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, inputs) -> (batch, tokens, this rank's outputs, or all of them if they are gathered)."""
        x = x if self._joined else copied(x, self._group)
        out = linear(x, self.weight.T if self._transposed else self.weight, self.bias)
        if self._gathered is None:
            return out
        total, size = self._gathered.shape[self._gathered.dim], self._gathered.size
        sizes = [(rank + 1) * total // size - rank * total // size for rank in range(size)]
        return joined_features(out, self._group, sizes)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features} of this rank"


class RowParallelLinear(nn.Module):
    """A linear layer of which each rank has some inputs; the outputs of all ranks are added."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        group: dist.ProcessGroup,
        *,
        transposed: bool = False,
        divided_tokens: bool = False,
    ) -> None:
        """Wraps parameters that are cut already.

        Args:
            weight: (outputs, this rank's inputs); (inputs, outputs) if `transposed`.
            bias: (outputs), which is added once.
            divided_tokens: whether each rank gets the sums of only its tokens.
        """
        super().__init__()
        self.weight = weight
        self.bias = bias
        self._group, self._transposed, self._divided = group, transposed, divided_tokens

    @property
    def in_features(self) -> int:
        """This rank's inputs."""
        return self.weight.shape[0 if self._transposed else 1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1 if self._transposed else 0]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, this rank's inputs) -> (batch, tokens, outputs)."""
        part = linear(x, self.weight.T if self._transposed else self.weight)
        out = (
            scattered_tokens(part, self._group, partial=True) if self._divided else summed(part, self._group)
        )
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features} of this rank, out_features={self.out_features}"


class VocabParallelEmbedding(nn.Module):
    """An embedding of which each rank has the rows of some tokens of the vocabulary."""

    def __init__(
        self, weight: nn.Parameter, group: dist.ProcessGroup, cut: Cut, padding_idx: int | None = None
    ) -> None:
        """Wraps a weight (this rank's vocabulary, features) that is cut already."""
        super().__init__()
        self.weight = weight
        self.num_embeddings, self.embedding_dim, self.padding_idx = cut.shape[0], cut.shape[1], padding_idx
        self._group, self._bounds = group, cut.bounds

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) -> (..., features)."""
        begin, end = self._bounds
        here = (tokens >= begin) & (tokens < end)
        own = embedding((tokens - begin).where(here, 0), self.weight)
        if self.padding_idx is not None:
            own = own.where((tokens != self.padding_idx).unsqueeze(-1), own.detach())
        return summed(own * here.unsqueeze(-1), self._group)


class HeadParallelEmbedding(nn.Module):
    """An embedding with a column for each head, of which each rank has those of its heads: T5's relative positions."""

    def __init__(self, weight: nn.Parameter) -> None:
        """Wraps a weight (entries, this rank's heads) that is cut already."""
        super().__init__()
        self.weight = weight

    def forward(self, index: Tensor) -> Tensor:
        """(...) -> (..., this rank's heads)."""
        return embedding(index, self.weight)
