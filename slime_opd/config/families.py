"""The supported model families, by `model_type` of a Hugging Face config.json, and the facts of each architecture.

The facts are those that the checks of flags, the expected tensors of a checkpoint and the memory estimate need; what
builds and converts the models is slime_opd/model/families. docs/models.md has what was tested of each. A test keeps the
three equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts of a family, under the names of its config.json and its weights.

    `dense_layers`: layers with an MLP instead: the first `first_k_dense_replace`, those listed by `mlp_only_layers` and
    `decoder_sparse_step`, or none.
    """

    count: str
    width: str = "moe_intermediate_size"
    prefix: str = "mlp"
    # Gate, up and down projection.
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    dense_layers: Literal["none", "first", "listed"] = "none"
    has_router_bias: bool = False
    has_shared_experts: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a family's architecture has; None: a key of its config.json decides.

    `qkv_bias`: by `attention_bias`; `output_bias`: whether that key means the attention's output projection too.
    `qk_norm`: by `use_qk_norm`. `may_have_mlp_bias`: where `mlp_bias` is set.
    """

    qkv_bias: bool | None = False
    output_bias: bool = False
    qk_norm: bool | None = False
    may_have_mlp_bias: bool = False
    # Norms of the attention's and the MLP's output, before the residual.
    has_post_norms: bool = False
    has_fused_gate: bool = False
    has_interleaved_rotary: bool = False
    has_latent_attention: bool = False
    experts: Experts | None = None

    def has_qkv_bias(self, architecture: Mapping[str, Any]) -> bool:
        """Whether the query, key and value projections of a model have biases."""
        return bool(architecture.get("attention_bias")) if self.qkv_bias is None else self.qkv_bias

    def has_qk_norm(self, architecture: Mapping[str, Any]) -> bool:
        """Whether queries and keys of a model are normalised."""
        return bool(architecture.get("use_qk_norm")) if self.qk_norm is None else self.qk_norm


_DEEPSEEK_EXPERTS = Experts(
    count="n_routed_experts", dense_layers="first", has_router_bias=True, has_shared_experts=True
)

FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(qk_norm=True, has_latent_attention=True, experts=_DEEPSEEK_EXPERTS),
    "glm4": Family(qkv_bias=None, has_post_norms=True, has_fused_gate=True, has_interleaved_rotary=True),
    "glm4_moe": Family(qkv_bias=None, qk_norm=None, experts=_DEEPSEEK_EXPERTS),
    "llama": Family(qkv_bias=None, output_bias=True, may_have_mlp_bias=True),
    "mimo": Family(qkv_bias=True),
    "mixtral": Family(
        experts=Experts(
            count="num_local_experts",
            width="intermediate_size",
            prefix="block_sparse_moe",
            projections=("w1", "w3", "w2"),
        )
    ),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qkv_bias=None, output_bias=True, qk_norm=True),
    "qwen3_moe": Family(
        qkv_bias=None, output_bias=True, qk_norm=True, experts=Experts(count="num_experts", dense_layers="listed")
    ),
}
SUPPORTED = tuple(FAMILIES)

# Families that people try, and why each is not supported.
UNSUPPORTED = {
    "gemma3": "Megatron-core has no layers with two rotary bases and a sliding window in some",
    "gemma3_text": "Megatron-core has no layers with two rotary bases and a sliding window in some",
    "qwen3_next": "Megatron-core's gated delta net takes no packed sequences",
    "qwen3_5": "Megatron-core's gated delta net takes no packed sequences",
    "qwen3_5_text": "Megatron-core's gated delta net takes no packed sequences",
    "qwen3_5_moe": "Megatron-core's gated delta net takes no packed sequences",
    "qwen3_5_moe_text": "Megatron-core's gated delta net takes no packed sequences",
    "qwen2_moe": "it has not been tested",
    "qwen2_5_vl": "it reads images, and only text is trained here",
    "qwen3_vl": "it reads images, and only text is trained here",
    "glm4v": "it reads images, and only text is trained here",
    "glm4v_moe": "it reads images, and only text is trained here",
    "internvl_chat": "it reads images, and only text is trained here",
}


def family_problem(model_type: object) -> str | None:
    """Why a model of this `model_type` cannot be trained, as the end of a sentence; None for one that can."""
    if model_type in SUPPORTED:
        return None
    supported = f"supported are {', '.join(SUPPORTED)}"
    if model_type is None:
        return f"its config.json has no model_type; {supported}"
    reason = UNSUPPORTED.get(model_type) if isinstance(model_type, str) else None
    return f"model_type {model_type!r} is not supported{f' ({reason})' if reason else ''}; {supported}"


def number_of_experts(architecture: Mapping[str, Any]) -> int | None:
    """The experts of a model, from its config.json; None without a mixture."""
    keys = ("num_experts", "n_routed_experts", "num_local_experts")
    return next((architecture[key] for key in keys if architecture.get(key)), None)
