"""Mixtral: MoE whose router weights sum to one over the selected experts.

mbridge takes the softmax over all experts and does not normalize it.
"""

from __future__ import annotations

from mbridge.core import register_model
from mbridge.models import MixtralBridge
from megatron.core.transformer import TransformerConfig


@register_model("mixtral")
class Mixtral(MixtralBridge):
    """MixtralForCausalLM."""

    def _build_config(self) -> TransformerConfig:
        return self._build_base_config(
            num_moe_experts=self.hf_config.num_local_experts,
            moe_ffn_hidden_size=self.hf_config.intermediate_size,
            moe_router_topk=self.hf_config.num_experts_per_tok,
            # Softmax over the selected experts: equal to the softmax over all, divided by its sum over the selected.
            moe_router_pre_softmax=False,
            moe_router_load_balancing_type="none",
            moe_grouped_gemm=True,
        )
