"""The section `expert_parallel`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Number, Positive, Section


class ExpertParallelConfig(Section):
    """Experts of a Hugging Face model that are dealt out to ranks."""

    enabled: bool = Field(default=False, description="Deal them out.")
    autoep_size: Positive = Field(default=1, description="Ranks among which the experts are divided.")
    expert_tensor_parallel_size: Positive = Field(default=1, description="Ranks that share an expert.")
    validate_folding_routing: bool = Field(default=False, description="Check routing between groups.")
    async_split_plan: bool = Field(default=False, description="Exchange sizes while computing.")
    preset_model: str | None = Field(
        default=None, description="mixtral, qwen3_moe, qwen3_5_moe, deepseek_v2, deepseek_v3 or minimax_m3."
    )
    moe_layer_pattern: str | None = Field(default=None, description="Names of the layers.")
    expert_pattern: str | None = Field(default=None, description="Name of the experts in a layer.")
    router_pattern: str | None = Field(default=None, description="Name of the router in a layer.")
    use_grouped_mm: bool = Field(default=True, description="One product for all experts.")
    disable_triton_grouped_mm: bool = Field(default=False, description="Not by Triton.")
    route_norm: bool | None = Field(default=None, description="Scale the gates to a sum of 1.")
    route_scale: Number = Field(default=1.0, description="Factor of the gates.")
    score_apply: Literal["auto", "pre", "post"] = Field(
        default="auto", description="Gates before or after the expert."
    )
    combine_impl: Literal["auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"] = Field(
        default="auto", description="How outputs are added."
    )
    row_weighting_impl: Literal["auto", "eager", "fused"] = Field(
        default="auto", description="How rows are scaled."
    )
    gate_up_impl: Literal["separate", "fused"] = Field(default="separate", description="One product or two.")
    comm_backend: Literal["comm", "deepep"] = Field(default="comm", description="Who exchanges tokens.")
    comm_num_sm: Positive = Field(default=12, description="Multiprocessors for the exchange.")
    comm_qp_margin: Count = Field(default=4, description="Spare queue pairs.")
    comm_max_tokens_per_rank: Count = Field(default=0, description="Tokens of a rank at most.")
    num_expert_groups: Positive | None = Field(default=None, description="Groups of experts.")
    num_limited_groups: Positive | None = Field(default=None, description="Groups that a token may use.")
    score_func: Literal["auto", "softmax", "sigmoid"] = Field(
        default="auto", description="Scores of the router."
    )
    top_k: Literal["auto"] | Positive = Field(default="auto", description="Experts of a token.")
    load_balance_coeff: Number | None = Field(default=None, description="Has to stay unset.")
    routed_scaling_factor: Literal["auto"] | Number = Field(default="auto", description="Factor of the sum.")
    expert_w1: str | None = Field(default=None, description="Name of the gate's weight.")
    expert_w2: str | None = Field(default=None, description="Name of the down projection.")
    expert_w3: str | None = Field(default=None, description="Name of the up projection; null: fused with w1.")
    num_experts_attr: str | None = Field(default=None, description="Where the model's config says how many.")
    top_k_attr: str | None = Field(default=None, description="Where it says how many for a token.")
    has_shared_experts: bool | None = Field(default=None, description="Some experts see all tokens.")
    shared_experts_pattern: str | None = Field(default=None, description="Name of those.")
    shared_experts_gate_pattern: str | None = Field(default=None, description="Name of their gate.")
    expert_activation: str | None = Field(default=None, description="Activation of the experts.")
