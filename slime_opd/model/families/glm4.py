"""GLM-4 (0414) and GLM-Z1, dense: norms before and after attention and MLP, and interleaved rotary pairs.

mbridge has only the vision models of the family.
"""

from __future__ import annotations

from typing import Any

from mbridge.core import register_model
from mbridge.models import Qwen2Bridge
from megatron.core.transformer import TransformerConfig


@register_model("glm4")
class Glm4(Qwen2Bridge):
    """Glm4ForCausalLM."""

    has_post_norms = True

    _ATTENTION_MAPPING = Qwen2Bridge._ATTENTION_MAPPING | {
        "self_attention.linear_proj.post_layernorm.weight": [
            "model.layers.{layer_number}.post_self_attn_layernorm.weight"
        ],
    }
    _MLP_MAPPING = Qwen2Bridge._MLP_MAPPING | {
        "mlp.linear_fc1.weight": ["model.layers.{layer_number}.mlp.gate_up_proj.weight"],
        "mlp.linear_fc2.post_layernorm.weight": ["model.layers.{layer_number}.post_mlp_layernorm.weight"],
    }

    def _build_config(self) -> TransformerConfig:
        return self._build_base_config(add_qkv_bias=self.hf_config.attention_bias, rotary_interleaved=True)

    def _get_gptmodel_args(self) -> dict[str, Any]:
        return super()._get_gptmodel_args() | {"rotary_percent": self.hf_config.partial_rotary_factor}
