"""DeepSeek-V3, R1 and Moonlight: MLA (multi-latent attention) and MoE.

mbridge's configuration is for an older Megatron-core and lacks the router's groups.
"""

from __future__ import annotations

from mbridge.core import register_model
from mbridge.models import DeepseekV3Bridge
from megatron.core.transformer import MLATransformerConfig

from slime_opd.errors import ConfigError
from slime_opd.model.families.routing import deepseek_router


@register_model("deepseek_v3")
class DeepseekV3(DeepseekV3Bridge):
    """DeepseekV3ForCausalLM without its layers for multi-token prediction, which are not trained here."""

    def _build_config(self) -> MLATransformerConfig:
        hf_config = self.hf_config
        scaling = hf_config.rope_scaling or {}
        kind = scaling.get("rope_type", scaling.get("type", "rope"))
        if kind not in ("rope", "default", "yarn"):
            raise ConfigError(
                f"--hf-checkpoint {hf_config.name_or_path}: its config.json has rope_scaling of type {kind!r}, expected yarn or none"
            )
        yarn = {
            "rotary_scaling_factor": scaling.get("factor"),
            "original_max_position_embeddings": scaling.get("original_max_position_embeddings"),
            "beta_fast": scaling.get("beta_fast", 32),
            "beta_slow": scaling.get("beta_slow", 1),
            "mscale": scaling.get("mscale", 1.0),
            "mscale_all_dim": scaling.get("mscale_all_dim", 0.0),
        }
        return self._build_base_config(
            qk_layernorm=True,
            q_lora_rank=hf_config.q_lora_rank,
            kv_lora_rank=hf_config.kv_lora_rank,
            qk_head_dim=hf_config.qk_nope_head_dim,
            qk_pos_emb_head_dim=hf_config.qk_rope_head_dim,
            v_head_dim=hf_config.v_head_dim,
            rotary_base=hf_config.rope_theta,
            **(
                {"rope_type": "yarn", **yarn} if kind == "yarn" else {"rope_type": "rope", "rotary_scaling_factor": 1.0}
            ),
            **deepseek_router(hf_config),
        )
