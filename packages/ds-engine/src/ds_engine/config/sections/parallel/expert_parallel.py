"""The section `expert_parallel`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Number, Positive, Section


class ExpertParallelConfig(Section):
    """Mixtures of experts: those of Hugging Face's models are divided among ranks, and tokens are exchanged for all."""

    enabled: bool = Field(
        default=False,
        description="Computes the experts of a Hugging Face model (Mixtral, Qwen-MoE, DeepSeek-V3 and others of their "
        "layout) by ds_moe, divided among autoep_size ranks. The other keys of the section hold for the layers of "
        "ds_moe in a model, too.",
    )
    autoep_size: Positive = Field(
        default=1,
        description="Number of data-parallel ranks among which the experts of a Hugging Face model are divided. Layers "
        "of ds_moe have an ep_size of their own.",
    )
    expert_tensor_parallel_size: Positive = Field(
        default=1,
        description="Number of ranks that share one expert: 1, or the number of tensor-parallel ranks.",
    )
    all_to_all: Literal["plain", "hierarchical"] = Field(
        default="plain",
        description="How tokens travel to the ranks of their experts: each rank sends to each other rank, or first "
        "inside of each machine and then one message to each other machine.",
    )
    all_to_all_bits: Literal[4, 8] | None = Field(
        default=None,
        description="Bits of an element of a token, and of its gradient, on the way. Default: those of the dtype in "
        "which the model computes.",
    )
    ranks_per_machine: Positive | None = Field(
        default=None,
        description="Number of consecutive ranks that are on one machine, for all_to_all hierarchical. Default: as the "
        "launcher says.",
    )
    validate_folding_routing: bool = Field(
        default=False, description="Checks that ranks which share data also agree on the routing of tokens."
    )
    async_split_plan: bool = Field(
        default=False, description="Exchanges the numbers of tokens while other work computes."
    )
    preset_model: str | None = Field(
        default=None,
        description="Model family whose module names are used: mixtral, qwen3_moe, qwen3_5_moe, deepseek_v2, "
        "deepseek_v3 or minimax_m3. Default: detected from the model.",
    )
    moe_layer_pattern: str | None = Field(
        default=None, description="Pattern of the names of expert layers. Default: that of the model family."
    )
    expert_pattern: str | None = Field(
        default=None,
        description="Pattern of the names of experts in a layer. Default: that of the model family.",
    )
    router_pattern: str | None = Field(
        default=None,
        description="Pattern of the names of routers in a layer. Default: that of the model family.",
    )
    use_grouped_mm: bool = Field(
        default=True, description="Computes all experts of a rank in one grouped matrix product."
    )
    disable_triton_grouped_mm: bool = Field(
        default=False, description="Computes grouped matrix products without Triton kernels."
    )
    route_norm: bool | None = Field(
        default=None,
        description="Normalises the gate values of a token to a sum of 1. Default: as the model family does.",
    )
    route_scale: Number = Field(default=1.0, description="Factor by which gate values are multiplied.")
    score_apply: Literal["auto", "pre", "post"] = Field(
        default="auto",
        description='Multiplies by the gate values before ("pre") or after ("post") the expert.',
    )
    combine_impl: Literal["auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"] = Field(
        default="auto", description="Implementation that adds up the outputs of the experts."
    )
    row_weighting_impl: Literal["auto", "eager", "fused"] = Field(
        default="auto", description="Implementation that multiplies rows by their gate values."
    )
    gate_up_impl: Literal["separate", "fused"] = Field(
        default="separate",
        description="Computes the gate and the up projection in two matrix products or in one.",
    )
    comm_backend: Literal["comm", "deepep"] = Field(
        default="comm", description="Library that exchanges tokens between ranks."
    )
    comm_num_sm: Positive = Field(
        default=12, description="Number of streaming multiprocessors that the exchange may use."
    )
    comm_qp_margin: Count = Field(
        default=4, description="Number of spare queue pairs of the network adapter."
    )
    comm_max_tokens_per_rank: Count = Field(
        default=0, description="Maximum number of tokens that a rank receives; 0 means no limit."
    )
    num_expert_groups: Positive | None = Field(
        default=None,
        description="Number of groups that the experts are divided into for routing. Default: that of the "
        "model.",
    )
    num_limited_groups: Positive | None = Field(
        default=None,
        description="Number of expert groups that one token may use. Default: that of the model.",
    )
    score_func: Literal["auto", "softmax", "sigmoid"] = Field(
        default="auto", description="Function that turns the router's outputs into scores."
    )
    top_k: Literal["auto"] | Positive = Field(
        default="auto", description='Number of experts per token; "auto" takes it from the model.'
    )
    load_balance_coeff: Number | None = Field(
        default=None,
        description="Coefficient of a load-balancing loss. DeepSpeed refuses any value, so leave it out. "
        "Default: none.",
    )
    routed_scaling_factor: Literal["auto"] | Number = Field(
        default="auto", description='Factor of the sum over routed experts; "auto" takes it from the model.'
    )
    expert_w1: str | None = Field(
        default=None, description="Name of the gate projection's weight. Default: that of the model family."
    )
    expert_w2: str | None = Field(
        default=None, description="Name of the down projection's weight. Default: that of the model family."
    )
    expert_w3: str | None = Field(
        default=None,
        description="Name of the up projection's weight. Default: none, which means that it is fused with "
        "expert_w1.",
    )
    num_experts_attr: str | None = Field(
        default=None,
        description="Attribute of the model's configuration that holds the number of experts. Default: that "
        "of the model family.",
    )
    top_k_attr: str | None = Field(
        default=None,
        description="Attribute of the model's configuration that holds the number of experts per token. "
        "Default: that of the model family.",
    )
    has_shared_experts: bool | None = Field(
        default=None,
        description="Whether some experts process all tokens. Default: as the model family does.",
    )
    shared_experts_pattern: str | None = Field(
        default=None, description="Pattern of the names of shared experts. Default: that of the model family."
    )
    shared_experts_gate_pattern: str | None = Field(
        default=None,
        description="Pattern of the names of the gates of shared experts. Default: that of the model family.",
    )
    expert_activation: str | None = Field(
        default=None, description="Activation function of the experts. Default: that of the model."
    )
