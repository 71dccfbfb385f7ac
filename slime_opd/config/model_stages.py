"""Options of the model: its architecture, and how it is laid out over the training GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slime_opd.config.conditions import equals, is_set
from slime_opd.config.options import option
from slime_opd.config.ranges import FRACTION, POSITIVE, POSITIVE_FRACTION, Range
from slime_opd.config.resume import ARCHITECTURE, COMPARED_SHAPES, HONOURED, NO_EFFECT, OnResume


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model: where its architecture and tokenizer come from"""

    hf_checkpoint: str | None = option(
        None,
        help="Hugging Face directory of the student: tokenizer, config, and the engines' first weights",
        metavar="DIR",
        on_resume=COMPARED_SHAPES,
        is_path=True,
    )
    megatron_to_hf_mode: str = option(
        "raw",
        choices=("raw", "bridge"),
        help="raw: architecture from the Megatron flags; bridge: from --hf-checkpoint",
        on_resume=COMPARED_SHAPES,
    )
    num_layers: int | None = option(None, help="transformer layers", within=POSITIVE, on_resume=ARCHITECTURE)
    hidden_size: int | None = option(None, help="hidden size", within=POSITIVE, on_resume=ARCHITECTURE)
    ffn_hidden_size: int | None = option(None, help="hidden size of the MLP", within=POSITIVE, on_resume=ARCHITECTURE)
    num_attention_heads: int | None = option(None, help="attention heads", within=POSITIVE, on_resume=ARCHITECTURE)
    group_query_attention: bool = option(
        False, help="share key and value heads between query heads", needs=("num_query_groups",), on_resume=ARCHITECTURE
    )
    num_query_groups: int | None = option(
        None,
        help="key and value heads",
        within=POSITIVE,
        only_with=(is_set("group_query_attention"),),
        on_resume=ARCHITECTURE,
    )
    kv_channels: int | None = option(
        None, help="size of one attention head; unset: hidden size / heads", within=POSITIVE, on_resume=ARCHITECTURE
    )
    swiglu: bool = option(False, help="gated SiLU in the MLP", on_resume=ARCHITECTURE)
    normalization: str = option(
        "LayerNorm", choices=("LayerNorm", "RMSNorm"), help="kind of norm", on_resume=ARCHITECTURE
    )
    norm_epsilon: float = option(1e-5, help="epsilon of the norms", within=POSITIVE, on_resume=ARCHITECTURE)
    qk_layernorm: bool = option(False, help="norm on queries and keys", on_resume=ARCHITECTURE)
    add_qkv_bias: bool = option(False, help="bias in the query, key and value projections", on_resume=ARCHITECTURE)
    disable_bias_linear: bool = option(False, help="no bias in the other linear layers", on_resume=ARCHITECTURE)
    untie_embeddings_and_output_weights: bool = option(
        False, help="output layer that does not share the embedding's weights", on_resume=ARCHITECTURE
    )
    use_rotary_position_embeddings: bool = option(
        False, help="rotary position embeddings (same as --position-embedding-type rope)", on_resume=NO_EFFECT
    )
    position_embedding_type: str = option(
        "rope", choices=("rope",), help="kind of position embedding", on_resume=ARCHITECTURE
    )
    no_position_embedding: bool = option(
        False,
        help="accepted for Megatron-LM's scripts: positions are rotary, and no other embedding is added",
        on_resume=NO_EFFECT,
    )
    rotary_base: int = option(10000, help="base of the rotary frequencies", within=POSITIVE, on_resume=ARCHITECTURE)
    rotary_percent: float = option(
        1.0, help="fraction of each head that is rotated", within=POSITIVE_FRACTION, on_resume=ARCHITECTURE
    )
    use_rope_scaling: bool = option(False, help="Llama 3's scaling of the rotary frequencies", on_resume=ARCHITECTURE)
    rotary_scaling_factor: float = option(
        8.0, help="factor of --use-rope-scaling", within=POSITIVE, on_resume=ARCHITECTURE
    )
    max_position_embeddings: int | None = option(
        None, help="longest sequence; unset: the Hugging Face config's", within=POSITIVE, on_resume=HONOURED
    )
    vocab_size: int | None = option(
        None, help="vocabulary size without padding", within=POSITIVE, on_resume=ARCHITECTURE
    )
    make_vocab_size_divisible_by: int = option(
        128,
        help="the vocabulary is padded to a multiple of this times the tensor-parallel size",
        within=Range(above=0, at_most=10**6, reason="the vocabulary would be padded to a multiple of it"),
        on_resume=COMPARED_SHAPES,
    )
    spec: tuple[str, ...] = option(
        (), help="accepted for slime's scripts: layers are chosen by the model's family", on_resume=NO_EFFECT
    )
    post_self_attn_layernorm: bool = option(
        False, help="norm of the attention's output, before the residual (GLM-4)", on_resume=ARCHITECTURE
    )
    post_mlp_layernorm: bool = option(
        False, help="norm of the MLP's output, before the residual (GLM-4)", on_resume=ARCHITECTURE
    )
    mtp_num_layers: int | None = option(
        None,
        help="accepted for models with layers for multi-token prediction, which are not trained",
        on_resume=NO_EFFECT,
    )
    attention_dropout: float = option(0.0, help="dropout of attention weights", within=FRACTION, on_resume=HONOURED)
    hidden_dropout: float = option(0.0, help="dropout of hidden states", within=FRACTION, on_resume=HONOURED)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallelism: how the model is laid out over the training GPUs"""

    on_resume: ClassVar[OnResume] = HONOURED

    tensor_model_parallel_size: int = option(1, help="ranks that each layer is split over", within=POSITIVE)
    pipeline_model_parallel_size: int = option(1, help="pipeline stages", within=POSITIVE)
    context_parallel_size: int = option(
        1, help="ranks that each sequence is split over (needs Transformer Engine)", within=POSITIVE
    )
    expert_model_parallel_size: int = option(1, help="ranks that the experts are distributed over", within=POSITIVE)
    expert_tensor_parallel_size: int = option(
        1, help="ranks that each expert is split over (needs Transformer Engine)", within=POSITIVE
    )
    sequence_parallel: bool = option(
        False, help="split norms and dropout over the tensor-parallel ranks; no effect on one"
    )
    recompute_granularity: str | None = option(
        None,
        choices=("full", "selective"),
        help="activations to recompute in the backward; unset: none",
        needs={"full": ("recompute_method", "recompute_num_layers")},
    )
    recompute_method: str | None = option(
        None,
        choices=("uniform", "block"),
        help="which layers --recompute-granularity full recomputes",
        only_with=(equals("recompute_granularity", "full"),),
    )
    recompute_num_layers: int | None = option(
        None, help="layers per recomputed block", within=POSITIVE, only_with=(equals("recompute_granularity", "full"),)
    )
