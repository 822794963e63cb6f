"""The rows of the section `expert_parallel`."""

from __future__ import annotations

from typing import Any

from ds_engine.config.built.row import Row, later, no_effect, works


def _divides_experts(config: Any) -> bool:
    return bool(config.expert_parallel.enabled)


ROWS: tuple[Row, ...] = (
    works(
        "expert_parallel",
        "ds-moe",
        "build/moe.py",
        needs="ds_moe",
        remedy="remove the section",
        switches={"expert_parallel.enabled": (False,)},
    ),
    *(
        works(
            f"expert_parallel.{name}",
            "ds-moe",
            "build/moe.py",
            only=_divides_experts,
            otherwise="expert_parallel.enabled is false",
        )
        for name in (
            "autoep_size",
            "expert_tensor_parallel_size",
            "all_to_all",
            "all_to_all_bits",
            "ranks_per_machine",
        )
    ),
    *(
        no_effect(f"expert_parallel.{name}", "ds-moe", why)
        for name, why in (
            ("validate_folding_routing", "expert parallelism is checked when groups are made"),
            ("async_split_plan", "the numbers of tokens are needed before their rows are sent"),
            ("preset_model", "experts are recognised by the layout of their weights"),
            ("use_grouped_mm", "products are grouped wherever that is fastest"),
            (
                "disable_triton_grouped_mm",
                "kernels of Triton are used only where torch has no grouped product",
            ),
            ("combine_impl", "there is one implementation, which adds in the order of choices"),
            ("row_weighting_impl", "there is one implementation"),
            ("gate_up_impl", "gate and up projection are one product, as in the model's weights"),
            ("comm_num_sm", "the exchange is that of torch.distributed"),
            ("comm_qp_margin", "the exchange is that of torch.distributed"),
            ("load_balance_coeff", "the model has an auxiliary loss of its own"),
        )
    ),
    *(
        later(f"expert_parallel.{name}", "ds-moe", what, remedy)
        for what, remedy, names in (
            (
                "experts that are found by the names of modules",
                "remove it; convert such layers to ds_moe.MoELayer yourself",
                (
                    "moe_layer_pattern",
                    "expert_pattern",
                    "router_pattern",
                    "expert_w1",
                    "expert_w2",
                    "expert_w3",
                    "num_experts_attr",
                    "top_k_attr",
                    "has_shared_experts",
                    "shared_experts_pattern",
                    "shared_experts_gate_pattern",
                    "expert_activation",
                ),
            ),
            (
                "routers other than the model's own",
                "remove it, and set it in the configuration of the model",
                (
                    "route_norm",
                    "route_scale",
                    "score_apply",
                    "num_expert_groups",
                    "num_limited_groups",
                    "score_func",
                    "top_k",
                    "routed_scaling_factor",
                ),
            ),
            ("DeepEP", "remove it", ("comm_backend",)),
            (
                "a limit of the tokens that a rank receives",
                "remove it, or use ds_moe.MoELayer with a capacity",
                ("comm_max_tokens_per_rank",),
            ),
        )
        for name in names
    ),
)
