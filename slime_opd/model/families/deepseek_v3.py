"""DeepSeek-V3, R1 and Moonlight: latent attention and a mixture of experts.

mbridge's configuration is for an older Megatron-core, leaves out the groups of the router, and reads weights on a GPU alone.
"""

from __future__ import annotations

from mbridge.core import register_model
from mbridge.core.safetensor_io import SafeTensorIO
from mbridge.models import DeepseekV3Bridge
from megatron.core.transformer import MLATransformerConfig
from torch import Tensor

from slime_opd.errors import ConfigError
from slime_opd.model.families.routing import deepseek_router


@register_model("deepseek_v3")
class DeepseekV3(DeepseekV3Bridge):
    """DeepseekV3ForCausalLM without its multi-token prediction, which is not trained here."""

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

    def _get_safetensor_io(self, weights_path: str) -> SafeTensorIO:
        return BlockScaledWeights(self._get_actual_hf_path(weights_path))


class BlockScaledWeights(SafeTensorIO):
    """Weights of a Hugging Face directory; those in fp8 times the scales of their blocks, in bfloat16.

    DeepSeek-V3 (arXiv 2412.19437), section 3.3.2: one float32 scale for each block of 128 rows and 128 columns, `NAME_scale_inv`.
    mbridge reads them with a CUDA kernel.
    """

    def load_some_hf_weight(self, hf_weight_names: list[str]) -> dict[str, Tensor]:
        """Weights by name."""
        found = super().load_some_hf_weight(hf_weight_names)
        scaled = [name for name, weight in found.items() if weight.dtype.itemsize == 1]
        scales = super().load_some_hf_weight([f"{name}_scale_inv" for name in scaled]) if scaled else {}
        return found | {name: _unscaled(found[name], scales[f"{name}_scale_inv"]) for name in scaled}


def _unscaled(weight: Tensor, scales: Tensor, block: int = 128) -> Tensor:
    """fp8 [M, N] and float32 [ceil(M/128), ceil(N/128)] -> bfloat16 [M, N]."""
    rows, columns = weight.shape
    scales = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return (weight.float() * scales).bfloat16()
