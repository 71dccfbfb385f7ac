"""Megatron's TransformerConfig from the flags: the architecture in raw mode, the run's settings in either mode."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from slime_opd.config import Config, machine
from slime_opd.config.attention import kernels_of
from slime_opd.config.kernels import Kernels
from slime_opd.model import device
from slime_opd.model.options import settings


def parameter_dtype(config: Config) -> torch.dtype:
    """The dtype that the model computes in."""
    if config.training.fp32:
        return torch.float32
    if config.training.fp16:
        return torch.float16
    if config.training.bf16 or device.has_cuda():
        return torch.bfloat16
    return torch.float32


def kernels(config: Config) -> Kernels:
    """The kernels of the model on this rank's machine.

    Raises ConfigError where the flags request one that cannot run.
    """
    return kernels_of(config, machine.of_this_process())


def config_from_flags(config: Config) -> TransformerConfig:
    """Megatron's config of the model in raw mode, where flags give the architecture."""
    model = config.model
    mla: dict[str, Any] = {}
    if config.megatron.multi_latent_attention:
        mla = {
            "rotary_base": model.rotary_base,
            "rotary_percent": model.rotary_percent,
            "rotary_scaling_factor": model.rotary_scaling_factor,
            # Megatron-LM's default, which is not the dataclass's: queries are not compressed.
            "q_lora_rank": None,
        } | settings(config, "latent_attention")
    return (MLATransformerConfig if mla else TransformerConfig)(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups if model.group_query_attention else model.num_attention_heads,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=F.silu if model.swiglu else F.gelu,
        qk_layernorm=model.qk_layernorm,
        add_qkv_bias=model.add_qkv_bias,
        add_bias_linear=not model.disable_bias_linear,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        **_layout_settings(config),
        **run_settings(config) | mla,
    )


def _layout_settings(config: Config) -> dict[str, Any]:
    layout = config.parallel
    return {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "context_parallel_size": layout.context_parallel_size,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size,
    }


def run_settings(config: Config) -> dict[str, Any]:
    """Fields of TransformerConfig that do not depend on the architecture: precision, kernels, recomputation.

    Megatron's own flags of the user come last, so they win.
    """
    layout, training = config.parallel, config.training
    chosen = kernels(config)
    dtype = parameter_dtype(config)
    fields = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        # As in Megatron-LM, it is off where there is no tensor parallelism.
        "sequence_parallel": layout.sequence_parallel and layout.tensor_model_parallel_size > 1,
        "variable_seq_lengths": True,
        # The only dispatcher that takes sequences of varying lengths; set even for models without experts.
        "moe_token_dispatcher_type": "alltoall",
        # Weights are loaded and exported under the names of the grouped layers.
        "moe_grouped_gemm": True,
        # Experts are not balanced unless a flag requests it, whatever the family's own training did.
        "moe_aux_loss_coeff": 0.0,
        "moe_router_bias_update_rate": 0.0,
        # Losses arrive divided by the whole step's denominators, so gradients are summed and never averaged.
        "calculate_per_token_loss": True,
        "use_cpu_initialization": not device.has_cuda(),
        "attention_softmax_in_fp32": training.attention_softmax_in_fp32,
        "recompute_granularity": layout.recompute_granularity,
        "recompute_method": layout.recompute_method,
        "recompute_num_layers": layout.recompute_num_layers,
        "batch_p2p_comm": device.has_cuda(),
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": chosen.uses_engine,
        "masked_softmax_fusion": chosen.uses_engine,
        "bias_activation_fusion": chosen.uses_engine,
        "bias_dropout_fusion": chosen.uses_engine,
        "apply_rope_fusion": chosen.rope_fusion,
    }
    if not device.has_cuda():
        # The overlap is of CUDA streams.
        fields["moe_shared_expert_overlap"] = False
    if chosen.attention == "engine" and training.attention_backend != "auto":
        fields["attention_backend"] = AttnBackend[training.attention_backend]
    return fields | settings(config, "transformer")
