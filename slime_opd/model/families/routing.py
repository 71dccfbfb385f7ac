"""The MoE router of DeepSeek-V3, which other families use too."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from slime_opd.errors import ConfigError


def deepseek_router(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Megatron's settings of an MoE with a sigmoid router, a selection bias, and shared experts.

    DeepSeek-V3 (arXiv 2412.19437), equations 12 to 16. The loaded bias is not updated, and no loss balances the
    experts: they were balanced on other data than rollouts. Raises ConfigError for a group selection that Megatron
    implements differently.
    """
    groups, selected = hf_config.n_group or 1, hf_config.topk_group or 1
    if groups > 1 and hf_config.num_experts_per_tok // selected != 2:
        raise ConfigError(
            f"--hf-checkpoint {hf_config.name_or_path}: its router selects {hf_config.num_experts_per_tok} experts from {selected} of {groups} groups, expected two from each group"
        )
    if not hf_config.norm_topk_prob:
        raise ConfigError(
            f"--hf-checkpoint {hf_config.name_or_path}: its config.json has norm_topk_prob false, expected true: Megatron's sigmoid router normalizes the weights of the selected experts"
        )
    dense = hf_config.first_k_dense_replace
    return {
        "num_moe_experts": hf_config.n_routed_experts,
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": hf_config.moe_intermediate_size * hf_config.n_shared_experts or None,
        "moe_layer_freq": [int(layer >= dense) for layer in range(hf_config.num_hidden_layers)],
        "moe_router_topk": hf_config.num_experts_per_tok,
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": selected if groups > 1 else None,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": hf_config.routed_scaling_factor,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": True,
    }
