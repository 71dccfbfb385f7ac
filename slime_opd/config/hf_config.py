"""Reads a Hugging Face directory: config.json, with the types of its values checked; end tokens; context length."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from slime_opd.config.config import Config

# Keys that tell architectures apart.
ARCHITECTURE_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "moe_intermediate_size",
)

# No size of a published model comes near it.
LARGEST = 10**8

_AT_LEAST_ONE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
    "max_position_embeddings", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "decoder_sparse_step",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "num_experts", "n_routed_experts", "num_local_experts", "num_experts_per_tok", "first_k_dense_replace", "n_shared_experts",
)  # fmt: skip
_NUMBERS = ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "routed_scaling_factor")
_TYPES: dict[type, tuple[str, ...]] = {
    dict: ("rope_scaling", "rope_parameters", "quantization_config", "text_config"),
    bool: ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_qk_norm"),
    str: ("model_type",),
    list: ("mlp_only_layers",),
}
_NAMES = {dict: "an object", bool: "true or false", str: "a string", list: "a list"}


def read_hf_config(directory: str | None) -> dict[str, Any]:
    """The config.json of a Hugging Face directory; {} where there is none.

    Raises ValueError, with one line per problem, if it cannot be read, is not JSON, or has a value of a wrong type.
    """
    config = read_json_object(directory, "config.json")
    file = Path(directory or "") / "config.json"
    if problems := [f"{file}: {problem}" for problem in _problems(config)]:
        raise ValueError("\n".join(problems))
    return config


def read_json_object(directory: str | None, name: str) -> dict[str, Any]:
    """The JSON object in file `name` of a directory; {} without the file. Raises ValueError if it cannot be read."""
    if directory is None:
        return {}
    file = Path(directory) / name
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{file} is not JSON") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a JSON object")
    return config


def language_model(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model; all of it unless the model also reads images."""
    return config.get("text_config") or config


def architecture_of(config: Config) -> dict[str, Any]:
    """The language model in --hf-checkpoint's config.json; {} if there is none, or none that can be read."""
    try:
        return language_model(read_hf_config(config.model.hf_checkpoint))
    except ValueError:
        return {}


def end_token_ids(directory: str | None) -> frozenset[int]:
    """The tokens that end a response, from generation_config.json. Raises ValueError where it cannot be read.

    Chat models often end a turn with a token that is not the tokenizer's end of sequence.
    """
    return token_ids(read_json_object(directory, "generation_config.json").get("eos_token_id"))


def token_ids(value: Any) -> frozenset[int]:
    """`eos_token_id` of a Hugging Face file as a set: it is a number, a list, or null."""
    return frozenset(int(token) for token in (value if isinstance(value, list) else [value]) if token is not None)


def context_length_of(model: dict[str, Any]) -> int | None:
    """Longest sequence of a language model in tokens, scaled as SGLang derives it; None if config.json has none."""
    positions = model.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    # Some families give the length before scaling, others after it.
    scaling = model.get("rope_scaling") or {}
    is_scaled = "original_max_position_embeddings" in scaling or scaling.get("rope_type") == "llama3"
    return int(positions * (1 if is_scaled else scaling.get("factor") or 1))


def _problems(config: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for keys, least in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
        for key in keys:
            value = config.get(key)
            if value is not None and not (type(value) is int and least <= value <= LARGEST):
                found.append((key, f"a whole number from {least} to {LARGEST}"))
    for key in _NUMBERS:
        value = config.get(key)
        if value is not None and not (type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)):
            found.append((key, "a finite number"))
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and not _is_positive(scaling.get("factor", 1)):
        found.append(("rope_scaling", "an object whose factor, if it has one, is a positive number"))
    for kind, keys in _TYPES.items():
        found += [(key, _NAMES[kind]) for key in keys if not isinstance(config.get(key), kind | None)]
    problems = [f"{prefix}{key} is {_shown(config[key])}, expected {expected}" for key, expected in found]
    inner = config.get("text_config")
    return problems + (_problems(inner, "text_config.") if isinstance(inner, dict) and not prefix else [])


def _is_positive(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value < 1e6)


def _shown(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
