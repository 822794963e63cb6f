"""The layer: a router, experts, and what stands beside them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe.dispatch.exchange import ExpertGroup
from ds_moe.errors import ExpertParallelError
from ds_moe.experts.stack import ExpertSource, LoopedExperts, Method, StackedExperts, make_experts
from ds_moe.local import checked_group, local_experts
from ds_moe.options import DropPolicy, Noise, RouterOptions
from ds_moe.parallel import run_experts
from ds_moe.report import LayerCounters
from ds_moe.routing.router import Router

_NOISES: Mapping[str | None, Noise] = {None: "none", "None": "none", "Jitter": "jitter", "RSample": "rsample"}


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a layer may have besides its routed experts, and how these are computed."""

    shared_expert: nn.Module | None = None
    """An expert for all tokens, whose output is added."""
    use_residual: bool = False
    """Whether the layer is a residual one: a dense copy of the expert beside the routed ones, and two learned
    coefficients for each token (PR-MoE)."""
    experts_by: Method = "auto"
    """"grouped": stacked weights and grouped products, which needs experts of `nn.Linear` and operations on rows.
    "loop": expert after expert. "auto": grouped if the expert permits it."""


class MoELayer(nn.Module):
    """A mixture of experts from explicit options. `MoE` makes one from DeepSpeed's arguments.

    With `ep_size` > 1, each of `ep_size` consecutive ranks holds a run of the experts; call `expert_mesh(model)` before
    the first forward, on all ranks.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: ExpertSource,
        options: RouterOptions,
        *,
        ep_size: int = 1,
        extras: Extras | None = None,
    ) -> None:
        """
        Args:
            expert: an expert, of which all are copies; or a function that makes one, called for each expert.

        Raises:
            ValueError: invalid options; `ExpertParallelError` if the sizes do not go together.
        """
        super().__init__()
        extras = extras or Extras()
        self.hidden_size, self.options, self.ep_size = hidden_size, options, ep_size
        self.local = local_experts(options.num_experts, ep_size)
        self.router = Router(hidden_size, options)
        self.experts: StackedExperts | LoopedExperts = make_experts(
            expert, options.num_experts, self.local, extras.experts_by
        )
        self.shared_expert = extras.shared_expert
        self.residual: nn.Module | None = None
        self.coefficient: nn.Linear | None = None
        if extras.use_residual:
            self.residual = copy.deepcopy(expert) if isinstance(expert, nn.Module) else expert()
            self.coefficient = nn.Linear(hidden_size, 2)
        self.num_experts = options.num_experts
        self.divides_experts = False
        """Whether tensor-parallel ranks hold parts of experts, where there are such ranks."""
        self.counters = LayerCounters()
        self._to: ExpertGroup | None = ExpertGroup(None) if ep_size == 1 else None

    def connect(self, to: ExpertGroup) -> None:
        """Sets the ranks that hold the experts; `expert_mesh` calls it.

        Raises:
            ExpertParallelError: another number of ranks than `ep_size`, or another rank than the experts were made for.
        """
        self._to = checked_group(to, self.ep_size, self.local)

    @property
    def expert_index(self) -> int:
        """Which of `ep_size` equal runs of experts this rank holds."""
        return self.local.start // len(self.local)

    def set_expert_index(self, index: int) -> None:
        """Says that the values of the experts are those of another run now."""
        self.local = local_experts(self.num_experts, self.ep_size, index)

    def expert_values(self) -> list[Tensor]:
        """Returns the parameters and buffers of this rank's experts."""
        return [*self.experts.parameters(), *self.experts.buffers()]

    def expert_parameters(self) -> dict[str, bool]:
        """Returns the names of the parameters of experts, and whether their first dimension is the experts."""
        names = (name for name, _ in self.experts.named_parameters(remove_duplicate=False))
        return {f"experts.{name}": self.experts.stacked for name in names}

    def tensor_dims(self) -> dict[str, tuple[int, int]]:
        """Returns name -> dimension along which tensor-parallel ranks cut a parameter of experts, and the number of its
        sections.

        Raises:
            ExpertParallelError: these experts cannot be cut.
        """
        if not isinstance(self.experts, StackedExperts):
            raise ExpertParallelError(
                "experts that run one by one cannot be cut among tensor-parallel ranks: use whole experts, or stacked "
                "ones (experts_by='grouped')"
            )
        return {f"experts.{name}": dims for name, dims in self.experts.tensor_dims().items()}

    def divide(self, group: dist.ProcessGroup) -> None:
        """Says that the parameters named by `tensor_dims` are this rank's parts now, among the ranks of `group`."""
        assert isinstance(self.experts, StackedExperts)
        self.experts.divide(group)

    def forward(self, hidden: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Sends every token through its experts. Collective among the ranks of the expert-parallel group; a rank may
        have no tokens.

        Args:
            hidden: (..., H).
            used_token: one element for each token, whether it takes part; other tokens (padding) get zeros from the
                routed experts. None: all.

        Returns:
            The output, of the shape of `hidden`; the auxiliary loss, to be added to the job's loss with a factor such
            as 0.01; and (E,) int64, the number of this rank's tokens that chose each expert.
        """
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"the input has {hidden.shape[-1]} features, but hidden_size={self.hidden_size}")
        if self._to is None:
            raise ExpertParallelError(
                f"this layer has ep_size={self.ep_size} and knows no group of ranks: call ds_moe.expert_mesh(model) on "
                "all ranks before the first forward (ds_engine.initialize does it)"
            )
        tokens = hidden.reshape(-1, self.hidden_size)
        used = self._used(used_token, tokens)
        routing = self.router(tokens, used)
        if self.training and torch.is_grad_enabled():
            self.counters.add(routing)
        out, shared = run_experts(
            tokens,
            routing.experts,
            routing.weights,
            routing.kept,
            num_experts=self.options.num_experts,
            run=self.experts,
            to=self._to,
            traffic=self.counters.traffic,
            meanwhile=None if self.shared_expert is None else lambda: self._shared(tokens),
        )
        if shared is not None:
            out = out + shared
        if self.residual is not None:
            out = self._with_residual(tokens, out)
        return out.to(hidden.dtype).view_as(hidden), routing.aux_loss, routing.counts

    def _used(self, used_token: Tensor | None, tokens: Tensor) -> Tensor | None:
        if used_token is None:
            return None
        used = used_token.reshape(-1).bool()
        if used.numel() != tokens.shape[0]:
            raise ValueError(f"used_token has {used.numel()} elements for {tokens.shape[0]} tokens")
        return used

    def _shared(self, tokens: Tensor) -> Tensor:
        assert self.shared_expert is not None
        out: Tensor = self.shared_expert(tokens)
        return out

    def _with_residual(self, tokens: Tensor, routed: Tensor) -> Tensor:
        """Rajbhandari et al., DeepSpeed-MoE (2022), section 4.1: a dense expert beside the routed one."""
        assert self.residual is not None and self.coefficient is not None
        share: Tensor = self.coefficient(tokens).softmax(-1)
        dense: Tensor = self.residual(tokens)
        return routed * share[:, :1] + dense * share[:, 1:]

    def extra_repr(self) -> str:
        """Returns which experts this rank holds."""
        return f"experts {self.local.start} to {self.local.stop - 1} of {self.options.num_experts}"


class MoE(MoELayer):
    """A mixture of experts with the arguments of `deepspeed.moe.layer.MoE`.

    `forward` returns `(output, l_aux, exp_counts)`; add `l_aux` to the loss with a factor such as 0.01.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: ExpertSource,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        *,
        experts_by: Method = "auto",
    ) -> None:
        """
        Args:
            expert: an expert, of which all are copies; or a function that makes one, called for each expert.
            num_experts: experts of the layer on all ranks together.
            ep_size: number of consecutive ranks that together hold the experts.
            k: experts for each token. One expert's weight is its probability; several weights are normalised.
            capacity_factor: tokens that an expert takes from a rank in training, as a multiple of an even share.
            eval_capacity_factor: the same in evaluation.
            min_capacity: the least number of tokens that an expert takes from a rank.
            use_residual: whether a dense expert stands beside the routed ones (PR-MoE).
            noisy_gate_policy: "Jitter", "RSample" (for k=1) or None.
            drop_tokens: whether an expert drops tokens beyond its capacity. False: no token is dropped, and nothing
                is padded to the largest count.
            use_rts: for k=1, whether random tokens are dropped in training instead of the last ones.
            use_tutel: has no effect: experts are grouped without Tutel.
            enable_expert_tensor_parallelism: whether the tensor-parallel ranks of a job of ds-engine each hold a part
                of every expert. False: each holds whole ones.
            top2_2nd_expert_sampling: for k=2, whether the second expert is chosen with Gumbel noise in training.
            experts_by: how experts are computed; see `Extras`.

        Source: Rajbhandari et al., DeepSpeed-MoE (2022).
        """
        if use_tutel:
            warnings.warn("use_tutel has no effect: experts are grouped without Tutel", stacklevel=2)
        if noisy_gate_policy not in _NOISES:
            raise ValueError(
                f"noisy_gate_policy={noisy_gate_policy!r}: it must be 'Jitter', 'RSample' or None"
            )
        noise = _NOISES[noisy_gate_policy]
        options = RouterOptions(
            num_experts=num_experts,
            k=k,
            noise="none" if noise == "rsample" and k > 1 else noise,
            sample_second=top2_2nd_expert_sampling and k == 2,
            drop=_drop_policy(k, random=use_rts) if drop_tokens else "none",
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            min_capacity=min_capacity,
        )
        extras = Extras(use_residual=use_residual, experts_by=experts_by)
        super().__init__(hidden_size, expert, options, ep_size=ep_size, extras=extras)
        self.divides_experts = enable_expert_tensor_parallelism


def _drop_policy(k: int, *, random: bool) -> DropPolicy:
    if k == 1:
        return "random" if random else "position"
    return "position" if k == 2 else "probs"
