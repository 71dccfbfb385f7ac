"""The layers of a model: Megatron-core's specs, with modules of our own where Transformer Engine is not.

Whichever they are, a torch_dist checkpoint has one set of keys: Transformer Engine's, which fuses most norms into the linear
layers behind them.
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
    # Two places of Megatron-core take Transformer Engine for installed where it is not.
    moe_utils.te_general_gemm = None
    multi_latent_attention.HAVE_TE = False

# The norms that Megatron's own layers keep apart, and where Transformer Engine's fused layers have them.
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
    """The spec of this pipeline stage's layers: Transformer Engine's, or those that run without it.

    `post_norms`: whether a norm follows attention, and MLP.
    """
    with_engine = kernels.uses_engine
    block = get_gpt_decoder_block_spec(architecture, use_transformer_engine=with_engine)
    layers = block.layer_specs if with_engine else [_local(layer, architecture) for layer in block.layer_specs]
    if kernels.attention != "engine":
        layers = [_with_packed_attention(layer, kernels) for layer in layers]
    norm = block.layer_norm if with_engine else LocalNorm
    if any(post_norms):
        layers = [_post_normed(layer, norm, *post_norms) for layer in layers]
    return replace(block, layer_specs=layers, layer_norm=norm)


def _with_packed_attention(layer: ModuleSpec, kernels: Kernels) -> ModuleSpec:
    """A layer whose core attention is this package's; it has no weights, so checkpoints do not change."""
    choice = {"kernel": kernels.attention, "repeats_groups": kernels.repeats_groups}
    core = ModuleSpec(module=PackedCoreAttention, params=choice)
    attention = layer.submodules.self_attention
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=core))
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))


def _post_normed(layer: ModuleSpec, norm: type, of_attention: bool, of_mlp: bool) -> ModuleSpec:
    attention, mlp = layer.submodules.self_attention, layer.submodules.mlp
    if of_attention:
        linear = with_post_norm(attention.submodules.linear_proj, norm)
        attention = replace(attention, submodules=replace(attention.submodules, linear_proj=linear))
    if of_mlp:
        linear = with_post_norm(mlp.submodules.linear_fc2, norm)
        mlp = replace(mlp, submodules=replace(mlp.submodules, linear_fc2=linear))
    keys = layer.submodules.sharded_state_dict_keys_map | POST_NORMS
    parts = replace(layer.submodules, self_attention=attention, mlp=mlp, sharded_state_dict_keys_map=keys)
    return replace(layer, submodules=parts)


def _local(layer: ModuleSpec, architecture: TransformerConfig) -> ModuleSpec:
    """One of Megatron's own layers, over packed sequences, at any sequence or expert parallelism."""
    parts = layer.submodules
    attention, mlp = parts.self_attention, parts.mlp
    parts_of_attention = {
        name: LocalNorm
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm")
        if getattr(attention.submodules, name, None) not in (None, IdentityOp)
    }
    latent = architecture.multi_latent_attention
    if latent:
        # Whole on every rank, as Transformer Engine has them: split by columns, Megatron loses the gradient of the rotary part
        # that comes from the other ranks' heads.
        parts_of_attention |= {"linear_q_down_proj": Linear, "linear_kv_down_proj": Linear}
    attention = replace(attention, submodules=replace(attention.submodules, **parts_of_attention))
    keys = dict(MLA_FUSED_NORMS if latent else FUSED_NORMS)
    if mlp.module is MoELayer:
        # The router reads what the experts read, so nothing can be fused there.
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
