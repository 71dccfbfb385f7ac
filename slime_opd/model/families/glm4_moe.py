"""GLM-4.5 and GLM-4.5-Air: MoE with DeepSeek-V3's router.

mbridge's configuration assumes a bias in the projections, and updates the router's bias in training.
"""

from __future__ import annotations

from mbridge.core import register_model
from mbridge.models.glm4moe import GLM4MoEBridge
from megatron.core.transformer import TransformerConfig

from slime_opd.model.families.routing import deepseek_router


@register_model("glm4_moe")
class Glm4Moe(GLM4MoEBridge):
    """Glm4MoeForCausalLM without its layers for multi-token prediction, which are not trained here."""

    def _build_config(self) -> TransformerConfig:
        return self._build_base_config(
            qk_layernorm=self.hf_config.use_qk_norm,
            add_qkv_bias=self.hf_config.attention_bias,
            **deepseek_router(self.hf_config),
        )
