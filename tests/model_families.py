"""The Hugging Face config of a model script: the family's own class, given the script's numbers and what the published configs share."""

from __future__ import annotations

from typing import Any

LLAMA_3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
ROUTED = {"n_shared_experts": 1, "norm_topk_prob": True, "n_group": 1, "topk_group": 1}
# By the script's name up to its first "-": the class of transformers, and what its numbers do not say.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"rope_theta": 1e6, "rms_norm_eps": 1e-6}),
    "qwen3moe": ("Qwen3Moe", {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "norm_topk_prob": True}),
    "qwen2.5": ("Qwen2", {"rope_theta": 1e6}),
    "mimo": ("Qwen2", {"rope_theta": 640000, "rms_norm_eps": 1e-5}),
    "llama3.1": ("Llama", {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "rope_scaling": LLAMA_3 | {"factor": 8.0}}),
    "llama3.2": ("Llama", {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "rope_scaling": LLAMA_3 | {"factor": 32.0}}),
    "mixtral": ("Mixtral", {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None}),
    "glm4": ("Glm4", {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5}),
    "glm4.5": ("Glm4Moe", ROUTED | {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5}),
    "deepseek": (
        "DeepseekV3",
        ROUTED | {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "rope_scaling": YARN, "n_group": 8, "topk_group": 4},
    ),
    "moonlight": ("DeepseekV3", ROUTED | {"rope_theta": 50000.0, "rms_norm_eps": 1e-5, "n_shared_experts": 2}),
}


def family_config(script: str, options: Any) -> tuple[str, Any]:
    """Class name and config of a script (its name without .sh) that was parsed to `options`."""
    import transformers

    model, megatron = options.model, options.megatron
    family = script.partition("-")[0]
    name, more = PUBLISHED[f"{family}moe" if f"{family}moe" in PUBLISHED and megatron.num_moe_experts else family]
    numbers = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }
    if megatron.num_moe_experts:
        experts = {"Qwen3Moe": "num_experts", "Mixtral": "num_local_experts"}.get(name, "n_routed_experts")
        numbers |= {experts: megatron.num_moe_experts, "num_experts_per_tok": megatron.moe_router_topk}
        if name != "Mixtral":
            numbers["moe_intermediate_size"] = megatron.moe_ffn_hidden_size
    if name in ("Glm4Moe", "DeepseekV3"):
        from slime_opd.config.megatron_options import layer_pattern

        numbers["first_k_dense_replace"] = layer_pattern(megatron.moe_layer_freq).count(0)
        numbers["routed_scaling_factor"] = megatron.moe_router_topk_scaling_factor
    if name in ("Glm4", "Glm4Moe"):
        numbers["attention_bias"] = model.add_qkv_bias
    if name == "Glm4Moe":
        numbers["use_qk_norm"] = model.qk_layernorm
    if megatron.multi_latent_attention:
        del numbers["head_dim"]
        numbers |= {
            "q_lora_rank": megatron.q_lora_rank,
            "kv_lora_rank": megatron.kv_lora_rank,
            "qk_nope_head_dim": megatron.qk_head_dim,
            "qk_rope_head_dim": megatron.qk_pos_emb_head_dim,
            "v_head_dim": megatron.v_head_dim,
        }
    numbers = {key: value for key, value in numbers.items() if value is not None or key == "q_lora_rank"}
    return name, getattr(transformers, f"{name}Config")(**numbers | more)


def number_of_parameters(name: str, config: Any) -> int:
    """Of the family's model: counted with its first layers, to which every other layer adds what the last of them does."""
    import copy

    import torch
    import transformers

    def counted(layers: int) -> int:
        few = copy.deepcopy(config)
        few.num_hidden_layers = layers
        if getattr(few, "layer_types", None):
            few.layer_types = few.layer_types[:layers]
        with torch.device("meta"):
            return getattr(transformers, f"{name}ForCausalLM")(few).num_parameters()

    first = getattr(config, "first_k_dense_replace", 0) + 1
    return counted(first) + (config.num_hidden_layers - first) * (counted(first + 1) - counted(first))
