"""Layer specs: Megatron-core's, with this package's modules where Transformer Engine is not used.

Either way a torch_dist checkpoint has the same keys: those of Transformer Engine's layers, which fuse most norms into
the linear layers behind them.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer import TransformerConfig, multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from slime_opd.config.kernels import Kernels
from slime_opd.model.attention import PackedCoreAttention
from slime_opd.model.experts import LocalExperts
from slime_opd.model.norm import LocalNorm
from slime_opd.model.post_norm import POST_NORMS, with_post_norm

if importlib.util.find_spec("transformer_engine") is None:
    # Two modules of Megatron-core assume that Transformer Engine is installed.
    moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = False

# Names of the separate norms in Megatron's own layers, and of the same norms in Transformer Engine's fused layers.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
MLA_FUSED_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def decoder_block(
    architecture: TransformerConfig, kernels: Kernels, *, post_norms: tuple[bool, bool] = (False, False)
) -> TransformerBlockSubmodules:
    """The spec of this pipeline stage's layers. `post_norms`: whether a norm follows attention, and MLP."""
    with_engine = kernels.uses_engine
    block = get_gpt_decoder_block_spec(architecture, use_transformer_engine=with_engine)
    layers = block.layer_specs if with_engine else [_local(layer, architecture) for layer in block.layer_specs]
    if kernels.attention != "engine":
        layers = [_with_packed_attention(layer, kernels) for layer in layers]
    norm = block.layer_norm if with_engine else LocalNorm
    if any(post_norms):
        layers = [_with_post_norms(layer, norm, *post_norms) for layer in layers]
    return replace(block, layer_specs=layers, layer_norm=norm)


def _with_packed_attention(layer: ModuleSpec, kernels: Kernels) -> ModuleSpec:
    """The layer with this package's core attention, which has no weights, so checkpoints do not change."""
    choice = {"kernel": kernels.attention, "repeats_groups": kernels.repeats_groups}
    core = ModuleSpec(module=PackedCoreAttention, params=choice)
    attention = layer.submodules.self_attention
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=core))
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))


def _with_post_norms(layer: ModuleSpec, norm: type, after_attention: bool, after_mlp: bool) -> ModuleSpec:
    attention, mlp = layer.submodules.self_attention, layer.submodules.mlp
    if after_attention:
        linear = with_post_norm(attention.submodules.linear_proj, norm)
        attention = replace(attention, submodules=replace(attention.submodules, linear_proj=linear))
    if after_mlp:
        linear = with_post_norm(mlp.submodules.linear_fc2, norm)
        mlp = replace(mlp, submodules=replace(mlp.submodules, linear_fc2=linear))
    keys = layer.submodules.sharded_state_dict_keys_map | POST_NORMS
    parts = replace(layer.submodules, self_attention=attention, mlp=mlp, sharded_state_dict_keys_map=keys)
    return replace(layer, submodules=parts)


def _local(layer: ModuleSpec, architecture: TransformerConfig) -> ModuleSpec:
    """One of Megatron's own layers, changed to run packed sequences at any sequence or expert parallelism."""
    parts = layer.submodules
    attention, mlp = parts.self_attention, parts.mlp
    attention_parts = {
        name: LocalNorm
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm")
        if getattr(attention.submodules, name, None) not in (None, IdentityOp)
    }
    uses_mla = architecture.multi_latent_attention
    if uses_mla:
        # Not split over ranks, as in Transformer Engine's spec: split by columns, Megatron loses the gradient of the
        # rotary part that comes from the other ranks' heads.
        attention_parts |= {"linear_q_down_proj": Linear, "linear_kv_down_proj": Linear}
    attention = replace(attention, submodules=replace(attention.submodules, **attention_parts))
    keys = dict(MLA_FUSED_NORMS if uses_mla else FUSED_NORMS)
    if mlp.module is MoELayer:
        # The router and the experts have the same input, so the norm cannot be fused into a linear layer.
        del keys["pre_mlp_layernorm."]
        mlp = replace(mlp, submodules=replace(mlp.submodules, experts=ModuleSpec(module=LocalExperts)))
    return replace(
        layer,
        submodules=replace(
            parts,
            input_layernorm=LocalNorm,
            self_attention=attention,
            pre_mlp_layernorm=LocalNorm,
            mlp=mlp,
            sharded_state_dict_keys_map=keys,
        ),
    )
