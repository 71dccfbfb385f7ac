"""The trained model: a Megatron-core GPT that stops at its hidden states.

Its architecture comes from the Hugging Face config through mbridge (`--megatron-to-hf-mode bridge`) or from
Megatron's flags (`raw`); either way the names and layouts of its weights in Hugging Face's form are mbridge's.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from mbridge.core.bridge import Bridge
from mbridge.core.parallel_states import ParallelStates
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slime_opd.config import Config, machine
from slime_opd.config.check_kernels import kernels_of
from slime_opd.config.kernels import Kernels
from slime_opd.errors import ConfigError
from slime_opd.head.vocabulary import VocabularyShard
from slime_opd.model import device, families, rotary
from slime_opd.model.layers import FUSED_NORMS, LATENT_FUSED_NORMS, decoder_block
from slime_opd.model.options import settings

# Of mbridge's arguments of a GPTModel: the vocabulary is padded here, and every rotary scaling is `_scale_rotary`'s (mbridge takes
# Llama 3's for a linear one).
_OUR_OWN = ("vocab_size", "seq_len_interpolation_factor")

_VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")


class HiddenStatesModel(GPTModel):
    """A GPTModel whose forward ends with the last hidden states [T, 1, H].

    The output layer's weights are there and trained, but logits are made chunk by chunk, in `output_layer`.
    """

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if self.post_process:
            # The output layer is never called, and what waits for its weights to be gathered is a hook before its call.
            for hook in self.output_layer._forward_pre_hooks.values():
                hook(self.output_layer, ())
        return hidden_states

    def _apply(self, *args, **kwargs) -> HiddenStatesModel:
        # A router's bias for the choice of experts is float32 whatever the model computes in; a cast would lose it.
        biases = {module: module.expert_bias for module in self.modules() if hasattr(module, "expert_bias")}
        super()._apply(*args, **kwargs)
        for module, bias in biases.items():
            if bias is not None:
                module.expert_bias = bias.to(module.expert_bias.device)
        return self

    def output_weight(self) -> Tensor:
        """The output layer's rows of this rank, [V/tp, H]; on the last pipeline stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


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
    """The kernels of the model on this rank's machine. Raises ConfigError where what the flags ask for cannot run."""
    return kernels_of(config, machine.of_this_process())


def uses_transformer_engine(config: Config) -> bool:
    """Whether layers are Transformer Engine's (they need CUDA) or Megatron's own."""
    return kernels(config).uses_engine


def make_bridge(config: Config, layout: ParallelStates | None = None) -> Bridge:
    """mbridge's view of the student, set up for a layout (by default this rank's) and layer spec.

    Raises ConfigError for a model family that mbridge does not know.
    """
    bridge = families.bridge_of(config.model.hf_checkpoint, parameter_dtype(config), layout)
    # mbridge keeps its table on the class and edits it for tied models: give this one a table of its own.
    bridge._DIRECT_MAPPING = dict(type(bridge)._DIRECT_MAPPING)
    tied = bridge.hf_config.tie_word_embeddings
    bridge._DIRECT_MAPPING["output_layer.weight"] = "model.embed_tokens.weight" if tied else "lm_head.weight"
    bridge.make_vocab_size_divisible_by = padding_multiple(config)
    bridge.vocab_size = bridge.hf_config.vocab_size
    bridge.padded_vocab_size = padded_vocabulary(bridge.vocab_size, config)
    latent = settings(config, "latent_attention") if config.megatron.multi_latent_attention else {}
    bridge.set_extra_args(**_run_settings(config) | latent)
    _name_norms_as_fused(bridge)
    # A teacher's vocabulary may have more rows than the student's, or fewer; mbridge takes the student's number alone.
    to_megatron = bridge._weight_to_mcore_format
    bridge._weight_to_mcore_format = lambda name, weights: to_megatron(
        name, [align_rows(weights[0], bridge.vocab_size)] if name in _VOCABULARY_WEIGHTS else weights
    )
    return bridge


def _name_norms_as_fused(bridge: Bridge) -> None:
    """Let mbridge, which knows Transformer Engine's names, find the norms of layers that keep them apart."""
    fused = dict(LATENT_FUSED_NORMS if isinstance(bridge.config, MLATransformerConfig) else FUSED_NORMS)
    if any("pre_mlp_layernorm" in name for name in bridge._MLP_MAPPING):
        del fused["pre_mlp_layernorm."]
    names = bridge._weight_name_mapping_mcore_to_hf

    def renamed(name: str) -> list[str]:
        for apart, inside in fused.items():
            name = name.replace(f".{apart}", f".{inside}")
        return names(name)

    bridge._weight_name_mapping_mcore_to_hf = renamed


def align_rows(weight: Tensor, rows: int) -> Tensor:
    """A weight [V, H] cut or padded with zeros to `rows`."""
    return weight[:rows] if len(weight) >= rows else F.pad(weight, (0, 0, 0, rows - len(weight)))


def padding_multiple(config: Config) -> int:
    """What the vocabulary is padded to a multiple of: Megatron's rule."""
    return config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size


def padded_vocabulary(size: int, config: Config) -> int:
    """Vocabulary size with padding."""
    return math.ceil(size / padding_multiple(config)) * padding_multiple(config)


def transformer_config(config: Config, bridge: Bridge) -> TransformerConfig:
    """Megatron's configuration of the model: the bridge's, or made from the Megatron flags."""
    if config.model.megatron_to_hf_mode == "bridge":
        return bridge.config
    model = config.model
    latent = {}
    if config.megatron.multi_latent_attention:
        latent = {
            "rotary_base": model.rotary_base,
            "rotary_percent": model.rotary_percent,
            "rotary_scaling_factor": model.rotary_scaling_factor,
            # Megatron-LM's default, which is not the dataclass's: queries are not compressed.
            "q_lora_rank": None,
        } | settings(config, "latent_attention")
    return (MLATransformerConfig if latent else TransformerConfig)(
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
        **_run_settings(config) | latent,
    )


def build_model(config: Config, bridge: Bridge, *, on_meta: bool = False) -> HiddenStatesModel:
    """This rank's pipeline stage, with fresh random weights, on this rank's device; on meta it has shapes alone."""
    rotary.install()
    architecture = transformer_config(config, bridge)
    if architecture.deterministic_mode:
        device.choose_deterministic_kernels()
    with torch.device("meta") if on_meta else nullcontext():
        model = HiddenStatesModel(
            config=architecture,
            transformer_layer_spec=decoder_block(architecture, kernels(config), post_norms=_post_norms(config, bridge)),
            vocab_size=bridge.padded_vocab_size,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            **_embedding_settings(config, bridge),
        )
    if config.model.megatron_to_hf_mode == "bridge":
        _scale_rotary(model, bridge.hf_config)
    return model.to(device=None if on_meta else device.device(), dtype=parameter_dtype(config))


def _scale_rotary(model: HiddenStatesModel, hf_config: PretrainedConfig) -> None:
    """Give the model the rotary frequencies of its Hugging Face config; mbridge passes the base alone.

    Raises ConfigError for a scaling that changes with the length, or that scales the attention too: Megatron's rotary
    embedding has no place for it.
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


def vocabulary_shard(model: HiddenStatesModel, bridge: Bridge) -> VocabularyShard:
    """This rank's rows of the output layer; on the last pipeline stage only."""
    group = parallel_state.get_tensor_model_parallel_group()
    rows = model.output_weight().shape[0]
    return VocabularyShard(
        start=rows * parallel_state.get_tensor_model_parallel_rank(),
        size=bridge.vocab_size,
        group=group if group.size() > 1 else None,
    )


def is_padding(name: str, weight: Tensor, bridge: Bridge) -> bool:
    """Whether all of this rank's rows of a weight are past the vocabulary."""
    first = len(weight) * parallel_state.get_tensor_model_parallel_rank()
    return name in _VOCABULARY_WEIGHTS and first >= bridge.vocab_size


def _post_norms(config: Config, bridge: Bridge) -> tuple[bool, bool]:
    """Whether a norm follows attention, and MLP."""
    model = config.model
    if model.megatron_to_hf_mode == "bridge":
        return (getattr(bridge, "has_post_norms", False),) * 2
    return model.post_self_attn_layernorm, model.post_mlp_layernorm


def _embedding_settings(config: Config, bridge: Bridge) -> dict:
    model = config.model
    if model.megatron_to_hf_mode == "bridge":
        return {
            **{key: value for key, value in bridge._get_gptmodel_args().items() if key not in _OUR_OWN},
            "share_embeddings_and_output_weights": bridge.hf_config.tie_word_embeddings,
        }
    return {
        "max_sequence_length": model.max_position_embeddings or bridge.hf_config.max_position_embeddings,
        "position_embedding_type": model.position_embedding_type,
        "rotary_base": model.rotary_base,
        "rotary_percent": model.rotary_percent,
        "rope_scaling": model.use_rope_scaling,
        "rope_scaling_factor": model.rotary_scaling_factor,
        "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
    }


def _layout_settings(config: Config) -> dict:
    layout = config.parallel
    return {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "context_parallel_size": layout.context_parallel_size,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size,
    }


def _run_settings(config: Config) -> dict:
    """What does not depend on the architecture: layout details, precision, kernels and recomputation."""
    layout, training = config.parallel, config.training
    chosen = kernels(config)
    with_engine = chosen.uses_engine
    dtype = parameter_dtype(config)
    found = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        # As in Megatron-LM, it is off where there is no tensor parallelism.
        "sequence_parallel": layout.sequence_parallel and layout.tensor_model_parallel_size > 1,
        "variable_seq_lengths": True,
        # The one dispatcher that takes sequences of varying lengths; asked for even where there are no experts.
        "moe_token_dispatcher_type": "alltoall",
        # The grouped layers' names of weights are the ones that are loaded and exported.
        "moe_grouped_gemm": True,
        # Experts are not balanced unless a flag says so, whatever the family's own training did.
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
        "persist_layer_norm": with_engine,
        "masked_softmax_fusion": with_engine,
        "bias_activation_fusion": with_engine,
        "bias_dropout_fusion": with_engine,
        "apply_rope_fusion": chosen.rope_fusion,
        # The overlap is of streams, which a CPU has not.
        **({} if device.has_cuda() else {"moe_shared_expert_overlap": False}),
    }
    if chosen.attention == "engine" and training.attention_backend != "auto":
        found["attention_backend"] = AttnBackend[training.attention_backend]
    # What the user says in Megatron's own words comes last.
    return found | settings(config, "transformer")
