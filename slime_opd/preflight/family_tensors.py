"""The tensors that a Hugging Face checkpoint of each family has, from its config.json: names and shapes.

A pure function of the config: building the model on the meta device takes half a minute for a mixture of 94 layers and
128 experts, and needs transformers. tests/unit/preflight/test_family_tensors.py compares it, for every family, with the
files that transformers writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from slime_opd.config.families import FAMILIES, Experts, Family
from slime_opd.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]

# No published model comes near it.
_MOST_TENSORS = 2 * 10**6


class _Numbers:
    """The whole numbers of a config.json, whose types were checked when it was read. A missing one is an error."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def __call__(self, name: str, default: int | None = None) -> int:
        value = self._config.get(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"it has no {name}")
        return value


def expected_tensors(config: Mapping[str, Any]) -> Shapes:
    """Shapes, by name, of all weights that are read of a model with this config.

    `config` is read by `config.hf_config.read_hf_config` and has a supported model_type. Raises CheckpointError if it
    lacks a number, or describes millions of tensors.
    """
    read, family = _Numbers(config), FAMILIES[config["model_type"]]
    hidden, vocabulary, layers = read("hidden_size"), read("vocab_size"), read("num_hidden_layers")
    attention = (_latent_attention if family.has_latent_attention else _attention)(config, family, read)
    norms: Shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if family.has_post_norms:
        norms |= {"post_self_attn_layernorm.weight": (hidden,), "post_mlp_layernorm.weight": (hidden,)}
    dense = {f"mlp.{name}": shape for name, shape in _mlp(config, family, read).items()}
    sparse = {} if family.experts is None else _experts(config, family, family.experts, read)
    if layers * (len(attention) + len(norms) + max(len(dense), len(sparse))) > _MOST_TENSORS:
        raise CheckpointError(f"num_hidden_layers is {layers}, which cannot be meant")
    found: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(layers):
        is_sparse = family.experts is not None and _is_sparse(config, family.experts, read, layer)
        shapes = {**norms, **attention, **(sparse if is_sparse else dense)}
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    return found


def may_be_extra(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the files may have a weight that is not in `expected_tensors`: it is not read, or copied unchanged."""
    layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
    is_multi_token_prediction = ".mtp" in name or (layer is not None and int(layer[1]) >= config["num_hidden_layers"])
    of_tied = name == "lm_head.weight" and bool(config.get("tie_word_embeddings"))
    return is_multi_token_prediction or of_tied or name.endswith(("_scale_inv", "rotary_emb.inv_freq"))


def _attention(config: Mapping[str, Any], family: Family, read: _Numbers) -> Shapes:
    hidden, heads = read("hidden_size"), read("num_attention_heads")
    width = read("head_dim", max(1, hidden // heads))
    queries, keys = heads * width, read("num_key_value_heads", heads) * width
    rows = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    biased = ("q_proj", "k_proj", "v_proj", *(["o_proj"] if family.output_bias else []))
    found: Shapes = {f"self_attn.{name}.weight": shape for name, shape in rows.items()}
    if family.has_qkv_bias(config):
        found |= {f"self_attn.{name}.bias": rows[name][:1] for name in biased}
    if family.has_qk_norm(config):
        found |= {"self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,)}
    return found


def _latent_attention(config: Mapping[str, Any], _: Family, read: _Numbers) -> Shapes:
    hidden, heads = read("hidden_size"), read("num_attention_heads")
    rotary, plain, value = read("qk_rope_head_dim"), read("qk_nope_head_dim"), read("v_head_dim")
    latent = read("kv_lora_rank")
    found: Shapes = {
        "kv_a_proj_with_mqa.weight": (latent + rotary, hidden),
        "kv_a_layernorm.weight": (latent,),
        "kv_b_proj.weight": (heads * (plain + value), latent),
        "o_proj.weight": (hidden, heads * value),
    }
    if config.get("q_lora_rank") is None:
        found["q_proj.weight"] = (heads * (plain + rotary), hidden)
    else:
        rank = read("q_lora_rank")
        found |= {
            "q_a_proj.weight": (rank, hidden),
            "q_a_layernorm.weight": (rank,),
            "q_b_proj.weight": (heads * (plain + rotary), rank),
        }
    if config.get("attention_bias"):
        biased = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
        found |= {f"{name}.bias": found[f"{name}.weight"][:1] for name in biased if f"{name}.weight" in found}
    return {f"self_attn.{name}": shape for name, shape in found.items()}


def _mlp(config: Mapping[str, Any], family: Family, read: _Numbers, width: int | None = None) -> Shapes:
    """A dense layer's MLP, or the shared experts of this `width` together."""
    hidden, width = read("hidden_size"), width or read("intermediate_size")
    if family.has_fused_gate:
        return {"gate_up_proj.weight": (2 * width, hidden), "down_proj.weight": (hidden, width)}
    rows = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    found: Shapes = {f"{name}.weight": shape for name, shape in rows.items()}
    if family.may_have_mlp_bias and config.get("mlp_bias"):
        found |= {f"{name}.bias": shape[:1] for name, shape in rows.items()}
    return found


def _experts(config: Mapping[str, Any], family: Family, experts: Experts, read: _Numbers) -> Shapes:
    """A layer's router and experts."""
    hidden, count, width = read("hidden_size"), read(experts.count), read(experts.width)
    if 3 * count > _MOST_TENSORS:
        raise CheckpointError(f"it has {count} experts, which cannot be meant")
    gate, up, down = experts.projections
    rows = {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}
    found: Shapes = {f"{experts.prefix}.gate.weight": (count, hidden)}
    if experts.has_router_bias:
        found["mlp.gate.e_score_correction_bias"] = (count,)
    if experts.has_shared_experts and (shared := read("n_shared_experts", 0)):
        shapes = _mlp(config, family, read, shared * width)
        found |= {f"mlp.shared_experts.{name}": shape for name, shape in shapes.items()}
    for expert in range(count):
        found |= {f"{experts.prefix}.experts.{expert}.{name}.weight": shape for name, shape in rows.items()}
    return found


def _is_sparse(config: Mapping[str, Any], experts: Experts, read: _Numbers, layer: int) -> bool:
    """Whether a layer has experts in place of an MLP."""
    if experts.dense_layers == "first":
        return layer >= read("first_k_dense_replace", 0)
    if experts.dense_layers == "listed":
        dense = config.get("mlp_only_layers") or []
        return layer not in dense and (layer + 1) % read("decoder_sparse_step", 1) == 0
    return True
