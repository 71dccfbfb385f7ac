"""Rules that compare flags with the architecture in --hf-checkpoint's config.json."""

from __future__ import annotations

from typing import Any

from slime_opd.config.check_megatron import flag_with_value, given_values, recomputed
from slime_opd.config.check_run import model_layout_problems
from slime_opd.config.config import Config
from slime_opd.config.families import FAMILIES, family_problem, number_of_experts
from slime_opd.config.hf_config import architecture_of, read_hf_config
from slime_opd.config.megatron_support import OF_MODEL, SUPPORT
from slime_opd.config.options import flag


def check_hf_config(config: Config) -> list[str]:
    """A config.json that cannot be read, or of a family that cannot be trained."""
    directory = config.model.hf_checkpoint
    try:
        hf_config = read_hf_config(directory)
    except ValueError as error:
        return [f"--hf-checkpoint: {problem}" for problem in str(error).splitlines()]
    if not hf_config or (problem := family_problem(hf_config.get("model_type"))) is None:
        return []
    return [f"--hf-checkpoint {directory}: {problem}"]


def check_layout_of_checkpoint(config: Config) -> list[str]:
    """Parallel sizes that do not divide the architecture in --hf-checkpoint (bridge mode)."""
    if config.model.megatron_to_hf_mode != "bridge" or config.model.hf_checkpoint is None:
        return []
    architecture = architecture_of(config)
    return model_layout_problems(
        config,
        layers=architecture.get("num_hidden_layers"),
        heads=architecture.get("num_attention_heads"),
        groups=architecture.get("num_key_value_heads"),
    )


# Megatron's flags of the architecture, and the same settings in a Hugging Face config.
_HF_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "rotary_scaling_factor": "rope_scaling.factor",
    "rotary_percent": "partial_rotary_factor",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}


def check_architecture_flags(config: Config) -> list[str]:
    """Flags that describe another model than --hf-checkpoint."""
    architecture = architecture_of(config)
    if config.model.megatron_to_hf_mode != "raw":
        return _contradictions_in_bridge_mode(config, architecture)
    # transformers 5 has one entry for all settings of rotary embeddings.
    rotary = architecture.get("rope_parameters") or {}
    architecture = {**rotary, "rope_scaling": rotary, **architecture}
    flags = {name: _flag_value(config, name) for name in _HF_KEYS}
    differing = {
        name: (flags[name], architecture[key])
        for name, key in _HF_KEYS.items()
        if architecture.get(key) is not None and flags[name] not in (None, architecture[key])
    }
    if config.megatron.multi_latent_attention:
        # There `head_dim` is of the rotary part alone, and every head has keys of its own.
        for name in ("kv_channels", "num_query_groups"):
            differing.pop(name, None)
    if config.megatron.num_moe_experts != number_of_experts(architecture) and architecture:
        differing["num_moe_experts"] = config.megatron.num_moe_experts, number_of_experts(architecture)
    if (
        not config.model.group_query_attention
        and architecture.get("num_key_value_heads") == config.model.num_attention_heads
    ):
        differing.pop("num_query_groups", None)
    scaling = architecture.get("rope_scaling") or {}
    if config.model.use_rope_scaling and scaling.get("factor") not in (None, config.model.rotary_scaling_factor):
        differing["rotary_scaling_factor"] = config.model.rotary_scaling_factor, scaling["factor"]
    file = f"{config.model.hf_checkpoint}/config.json"
    problems = [
        f"{flag(name)}: found {found}, but {file} has {_HF_KEYS.get(name, 'experts:')} {has}: take the MODEL_ARGS of its own model"
        for name, (found, has) in differing.items()
    ]
    return problems + [
        f"{flag(name)} is {'set' if _flag_value(config, name) else 'missing'}, but {file} has {has}: {'drop' if _flag_value(config, name) else 'add'} it"
        for name, expected, has in _switches(architecture)
        if bool(_flag_value(config, name)) != expected
    ]


def _contradictions_in_bridge_mode(config: Config, architecture: dict[str, Any]) -> list[str]:
    """Flags of the model that nothing reads in bridge mode, and that are wrong besides."""
    has = {name: architecture.get(_HF_KEYS[name]) for name in _HF_KEYS if name in OF_MODEL}
    if architecture:
        has["num_moe_experts"] = number_of_experts(architecture) or 0
    return [
        f"{flag(name)}: found {found}, but {config.model.hf_checkpoint}/config.json has {expected}, and --megatron-to-hf-mode bridge takes the model from there: drop the flag"
        for name, expected in has.items()
        if expected is not None and (found := getattr(config.megatron, name)) not in (None, expected)
    ]


def architecture_flags(config: Config) -> dict[str, Any]:
    """The architecture that the flags describe, under Hugging Face's names."""
    flags = {key: _flag_value(config, name) for name, key in _HF_KEYS.items()}
    if not config.model.group_query_attention:
        flags["num_key_value_heads"] = config.model.num_attention_heads
    if not config.model.use_rope_scaling:
        flags.pop("rope_scaling.factor")
    return {key: value for key, value in flags.items() if value is not None}


def _flag_value(config: Config, name: str) -> Any:
    """The value of an architecture flag, which is ours or Megatron's."""
    return getattr(config.model if hasattr(config.model, name) else config.megatron, name)


def _switches(architecture: dict) -> list[tuple[str, bool, str]]:
    """Megatron's switches that a Hugging Face config decides: name, expected value, and what the config has."""
    found, kind = [], architecture.get("model_type")
    if isinstance(tied := architecture.get("tie_word_embeddings"), bool):
        found.append(("untie_embeddings_and_output_weights", not tied, f"tie_word_embeddings {str(tied).lower()}"))
    family = FAMILIES.get(kind or "")
    if family is None:
        return found
    expected = {
        "add_qkv_bias": family.has_qkv_bias(architecture),
        "qk_layernorm": family.has_qk_norm(architecture),
        "post_self_attn_layernorm": family.has_post_norms,
        "post_mlp_layernorm": family.has_post_norms,
        "multi_latent_attention": family.has_latent_attention,
        "rotary_interleaved": family.has_interleaved_rotary,
    }
    found += [(name, value, f"model_type {kind}") for name, value in expected.items()]
    if not family.has_latent_attention:
        scaling = architecture.get("rope_scaling") or {}
        rope = scaling.get("rope_type", scaling.get("type", "default"))
        found.append(("use_rope_scaling", rope == "llama3", f"rope_scaling of type {rope}"))
    return found


def check_top_k_of_vocabulary(config: Config) -> list[str]:
    """More tokens of a top-k than there are."""
    vocabulary = architecture_of(config).get("vocab_size")
    top_k = config.divergence.opd_log_prob_top_k
    if vocabulary is None or top_k <= vocabulary:
        return []
    return [
        f"--opd-log-prob-top-k: found {top_k}, expected at most the vocabulary's {vocabulary} tokens ({config.model.hf_checkpoint}/config.json)"
    ]


def check_mixture(config: Config) -> list[str]:
    """Layouts that a mixture of experts cannot be trained at, and experts of a model that has none."""
    layout = config.parallel
    architecture = architecture_of(config)
    if not architecture and config.model.num_layers is None:
        return []
    experts = config.megatron.num_moe_experts or number_of_experts(architecture)
    shared = layout.expert_model_parallel_size
    if not experts:
        return [
            f"{flag(name)}: found {getattr(layout, name)}, expected 1: the model has no experts to share"
            for name in ("expert_model_parallel_size", "expert_tensor_parallel_size")
            if getattr(layout, name) > 1
        ]
    problems = []
    if layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel:
        problems.append(
            f"--tensor-model-parallel-size {layout.tensor_model_parallel_size} with a mixture of experts: add --sequence-parallel, or each rank would train on the same tokens"
        )
    if experts % shared:
        problems.append(f"--expert-model-parallel-size: found {shared}, expected a divisor of the {experts} experts")
    return problems


def check_kind_of_model(config: Config) -> list[str]:
    """Options of a mixture of experts, or of latent attention, given for a model that is or has none."""
    architecture, stage = architecture_of(config), config.megatron
    if not architecture and config.model.num_layers is None:
        return []
    problems = []
    if not (stage.num_moe_experts or number_of_experts(architecture)):
        given = [
            flag_with_value(name, value)
            for name, value in given_values(config).items()
            if name.startswith("moe_") and not SUPPORT[name].is_refused
        ]
        given += [f"--recompute-modules {name}" for name in recomputed(config, "experts")]
        problems += [f"{shown} has no effect: the model has no experts (--num-experts)" for shown in given]
    if not (stage.multi_latent_attention or architecture.get("kv_lora_rank")):
        problems += [
            f"--recompute-modules {name} needs a model with latent attention (--multi-latent-attention)"
            for name in recomputed(config, "latent attention")
        ]
    return problems
