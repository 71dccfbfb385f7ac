"""Builds the trained model, from the Hugging Face config (bridge mode) or from Megatron's flags (raw mode)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slime_opd.config import Config
from slime_opd.errors import ConfigError
from slime_opd.model import device, rotary
from slime_opd.model.bridge import ModelBridge
from slime_opd.model.hidden_states import HiddenStatesModel
from slime_opd.model.layers import decoder_block
from slime_opd.model.transformer_config import config_from_flags, kernels, parameter_dtype


def build_model(config: Config, bridge: ModelBridge, *, on_meta: bool = False) -> HiddenStatesModel:
    """This rank's pipeline stage with new random weights, on this rank's device. `on_meta`: shapes without memory."""
    rotary.install()
    architecture = transformer_config(config, bridge)
    if architecture.deterministic_mode:
        device.choose_deterministic_kernels()
    with torch.device("meta") if on_meta else nullcontext():
        model = HiddenStatesModel(
            config=architecture,
            transformer_layer_spec=decoder_block(architecture, kernels(config), post_norms=post_norms(config, bridge)),
            vocab_size=bridge.padded_vocab_size,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            **embedding_settings(config, bridge),
        )
    if _is_bridge_mode(config):
        _scale_rotary(model, bridge.hf_config)
    return model.to(device=None if on_meta else device.device(), dtype=parameter_dtype(config))


def transformer_config(config: Config, bridge: ModelBridge) -> TransformerConfig:
    """Megatron's config of the model."""
    return bridge.config if _is_bridge_mode(config) else config_from_flags(config)


def post_norms(config: Config, bridge: ModelBridge) -> tuple[bool, bool]:
    """Whether a norm follows attention, and MLP."""
    if _is_bridge_mode(config):
        return bridge.has_post_norms, bridge.has_post_norms
    return config.model.post_self_attn_layernorm, config.model.post_mlp_layernorm


def embedding_settings(config: Config, bridge: ModelBridge) -> dict[str, Any]:
    """Arguments of GPTModel about positions and embeddings."""
    model = config.model
    if _is_bridge_mode(config):
        arguments = bridge.gpt_model_arguments()
        # Not mbridge's vocabulary, which is without padding, nor its rotary scaling, which takes Llama 3's for a linear
        # one.
        arguments = {n: v for n, v in arguments.items() if n not in ("vocab_size", "seq_len_interpolation_factor")}
        return arguments | {"share_embeddings_and_output_weights": bridge.is_tied}
    return {
        "max_sequence_length": model.max_position_embeddings or bridge.hf_config.max_position_embeddings,
        "position_embedding_type": model.position_embedding_type,
        "rotary_base": model.rotary_base,
        "rotary_percent": model.rotary_percent,
        "rope_scaling": model.use_rope_scaling,
        "rope_scaling_factor": model.rotary_scaling_factor,
        "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
    }


def _is_bridge_mode(config: Config) -> bool:
    return config.model.megatron_to_hf_mode == "bridge"


def _scale_rotary(model: HiddenStatesModel, hf_config: PretrainedConfig) -> None:
    """Give the model the rotary frequencies of its Hugging Face config; mbridge passes the base alone.

    Raises ConfigError for a scaling that changes with the length, or that scales attention too: Megatron's rotary
    embedding supports neither.
    """
    scaling = getattr(hf_config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default" or not isinstance(getattr(model, "rotary_pos_emb", None), RotaryEmbedding):
        return
    if kind not in ("linear", "llama3"):
        raise ConfigError(
            f"--hf-checkpoint {hf_config.name_or_path}: its config.json has rope_scaling of type {kind!r}, expected linear, llama3 or none"
        )
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    model.rotary_pos_emb.inv_freq = frequencies.to(model.rotary_pos_emb.inv_freq)
