"""How tokens choose experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Score = Literal["softmax", "sigmoid"]
Noise = Literal["none", "jitter", "rsample"]
DropPolicy = Literal["none", "position", "probs", "random"]


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """The choice of experts, and what happens to tokens that an expert has no room for."""

    num_experts: int
    """Number of experts E of the layer, on all ranks together."""
    k: int = 1
    """Number of experts K for each token."""
    score: Score = "softmax"
    """From logits to scores: "softmax" over the experts, or an independent "sigmoid" for each (DeepSeek-V3)."""
    normalize: bool | None = None
    """Whether the weights of a token's experts are divided by their sum. None: if k > 1 or scores are sigmoids."""
    scale: float = 1.0
    """Factor of all weights (`routed_scaling_factor` of DeepSeek-V3)."""
    num_groups: int = 1
    """Number of groups of consecutive experts. With several, a token chooses among the experts of its best
    `groups_per_token` groups only."""
    groups_per_token: int = 1
    """Number of groups among whose experts a token chooses. No effect with one group."""
    noise: Noise = "none"
    """Noise during training: "jitter" multiplies the router's input by a number from U(0.99, 1.01), "rsample" adds
    Gumbel noise to the logits of the first choice."""
    sample_second: bool = False
    """Whether, during training, Gumbel noise is added to the logits of the second of two choices."""
    drop: DropPolicy = "none"
    """Which tokens an expert drops if more than its capacity choose it. "none": it takes all (dropless).
    "position": those that come last; all first choices come before second ones. "probs": those with the smallest
    scores. "random": random ones during training, and those that come last in evaluation."""
    capacity_factor: float = 1.0
    """Capacity in training as a multiple of T K / E, the number of tokens of an expert if all were equally loaded."""
    eval_capacity_factor: float = 1.0
    """The same in evaluation."""
    min_capacity: int = 4
    """Smallest capacity in tokens."""
    bias_rate: float = 0.0
    """Step by which `update_biases` moves the bias of an expert's score against its load (balancing without a loss).
    0: there is no bias."""
    z_loss: float = 0.0
    """Factor of the z-loss, the mean of logsumexp(logits)^2, in the auxiliary loss."""

    def __post_init__(self) -> None:
        self._check_sizes()
        for name, kinds in (("score", Score), ("noise", Noise), ("drop", DropPolicy)):
            value = getattr(self, name)
            if value not in get_args(kinds):
                raise ValueError(
                    f"{name}={value!r}: it must be one of {', '.join(map(repr, get_args(kinds)))}"
                )
        for name in ("capacity_factor", "eval_capacity_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: it must be positive; without a limit, use drop='none'"
                )
        if self.min_capacity < 0:
            raise ValueError(f"min_capacity={self.min_capacity}: it must not be negative")
        if self.sample_second and self.k != 2:
            raise ValueError(f"sample_second needs k=2, but k={self.k}")
        if self.noise == "rsample" and self.k != 1:
            raise ValueError(f"noise='rsample' needs k=1, but k={self.k}; use noise='jitter'")

    def _check_sizes(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"num_experts={self.num_experts}: it must be at least 1")
        if not 1 <= self.k <= self.num_experts:
            raise ValueError(f"k={self.k}: it must be from 1 to num_experts={self.num_experts}")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} must divide num_experts={self.num_experts}")
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise ValueError(
                f"groups_per_token={self.groups_per_token}: it must be from 1 to num_groups={self.num_groups}"
            )
        allowed = self.num_experts // self.num_groups * self.groups_per_token
        if self.k > allowed:
            raise ValueError(
                f"k={self.k}, but {self.groups_per_token} of {self.num_groups} groups have only {allowed} experts"
            )

    @property
    def normalizes(self) -> bool:
        """Whether the weights of a token's experts are divided by their sum."""
        return self.normalize if self.normalize is not None else self.k > 1 or self.score == "sigmoid"
