"""Model families: a tiny random model of each, and the Hugging Face config that a model script describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PUBLISHED_LLAMA_3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
PUBLISHED_YARN = {
    "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
PUBLISHED_ROUTED = {"n_shared_experts": 1, "norm_topk_prob": True, "n_group": 1, "topk_group": 1}
# By the script's name up to its first "-": the class of transformers, and what its numbers do not say.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"rope_theta": 1e6, "rms_norm_eps": 1e-6}),
    "qwen3moe": ("Qwen3Moe", {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "norm_topk_prob": True}),
    "qwen2.5": ("Qwen2", {"rope_theta": 1e6}),
    "mimo": ("Qwen2", {"rope_theta": 640000, "rms_norm_eps": 1e-5}),
    "llama3.1": (
        "Llama",
        {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "rope_scaling": PUBLISHED_LLAMA_3 | {"factor": 8.0}},
    ),
    "llama3.2": (
        "Llama",
        {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "rope_scaling": PUBLISHED_LLAMA_3 | {"factor": 32.0}},
    ),
    "mixtral": ("Mixtral", {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None}),
    "glm4": ("Glm4", {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5}),
    "glm4.5": ("Glm4Moe", PUBLISHED_ROUTED | {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5}),
    "deepseek": (
        "DeepseekV3",
        PUBLISHED_ROUTED
        | {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "rope_scaling": PUBLISHED_YARN, "n_group": 8, "topk_group": 4},
    ),
    "moonlight": (
        "DeepseekV3",
        PUBLISHED_ROUTED | {"rope_theta": 50000.0, "rms_norm_eps": 1e-5, "n_shared_experts": 2},
    ),
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
    """Of the family's model: counted with its first layers; each other layer adds what the last of them does."""
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


SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROUTED = {
    "moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 48, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24, "num_key_value_heads": 4,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1, "mscale": 0.8,
    "mscale_all_dim": 1.2,
}  # fmt: skip
# Family: its transformers class, and what its published models have that the shape does not.
FAMILIES = {
    "Qwen2, Qwen2.5": ("Qwen2", {}),
    "Qwen2, Qwen2.5, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"head_dim": 32}),
    "Qwen3, tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "Llama 2": ("Llama", {}),
    "Llama 3.1": (
        "Llama",
        {"rope_theta": 5e5, "rope_scaling": LLAMA_3 | {"original_max_position_embeddings": 64}},
    ),
    "Llama 3.2, tied": (
        "Llama",
        {
            "rope_theta": 5e5,
            "rope_scaling": LLAMA_3 | {"factor": 32.0, "original_max_position_embeddings": 64},
            "tie_word_embeddings": True,
        },
    ),
    "Llama, linear scaling": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "GLM-4": ("Glm4", {"head_dim": 32, "attention_bias": True}),
    "MiMo": ("MiMo", {}),
    "Qwen3 MoE": (
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "GLM-4.5": ("Glm4Moe", ROUTED | {"head_dim": 32, "attention_bias": True, "use_qk_norm": True}),
    "GLM-4.5-Air": ("Glm4Moe", ROUTED | {"head_dim": 32, "attention_bias": True, "use_qk_norm": False}),
    "DeepSeek-V3": (
        "DeepseekV3",
        ROUTED
        | LATENT
        | {
            "q_lora_rank": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "rope_scaling": YARN,
        },
    ),
    "Moonlight": ("DeepseekV3", ROUTED | LATENT | {"q_lora_rank": None}),
}
# Families whose classes live beside their weights, and the class of transformers that is the same without their extra
# layers.
OF_TRANSFORMERS = {"MiMo": "Qwen2"}
MIXTURES = {"Qwen3Moe", "Mixtral", "Glm4Moe", "DeepseekV3"}
# Families whose engine runs on a CPU; SGLang's has no latent attention there, and MiMo's config class comes with its
# weights.
SERVED = ("Qwen2, Qwen2.5", "Qwen3", "Llama 3.1", "GLM-4", "Qwen3 MoE", "Mixtral", "GLM-4.5")


def save_model(directory: Path, family: str) -> None:
    """A random model of the family, its biases too: a bias that is 0 would hide that it is lost."""
    import torch
    import transformers

    name, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = tiny_config(family)
    model = getattr(transformers, f"{OF_TRANSFORMERS.get(name, name)}ForCausalLM")(config).float()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("bias"):
                tensor.normal_(0, 0.5)
            elif key.endswith("mlp.gate.weight"):
                tensor.normal_(0, 0.2)
            if key.endswith("e_score_correction_bias"):
                # Transformers gives a group that is not chosen the score 0, DeepSeek and Megatron minus infinity: keep
                # scores above.
                tensor.abs_()
    model.save_pretrained(directory)
    _name_family(directory, name)


def tiny_config(family: str) -> Any:
    """The config of the family's tiny model."""
    import transformers

    name, more = FAMILIES[family]
    return getattr(transformers, f"{OF_TRANSFORMERS.get(name, name)}Config")(**SHAPE | more)


def save_config(directory: Path, family: str) -> None:
    """The config.json of the family's tiny model, without its weights."""
    name, _ = FAMILIES[family]
    config = tiny_config(family)
    config.architectures = [f"{OF_TRANSFORMERS.get(name, name)}ForCausalLM"]
    config.save_pretrained(directory)
    _name_family(directory, name)


def _name_family(directory: Path, name: str) -> None:
    if name in OF_TRANSFORMERS:
        path = directory / "config.json"
        path.write_text(
            json.dumps(
                json.loads(path.read_text()) | {"model_type": name.lower(), "architectures": [f"{name}ForCausalLM"]}
            )
        )
