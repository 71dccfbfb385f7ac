"""MiMo: Qwen2 with layers for multi-token prediction, which are not trained here.

Its config class is in a Python file beside its weights; reading the config as Qwen2's runs no code of a checkpoint.
"""

from __future__ import annotations

from mbridge.core import register_model
from mbridge.models import Qwen2Bridge
from transformers import AutoConfig, Qwen2Config


class MiMoConfig(Qwen2Config):
    """The config.json of MiMoForCausalLM."""

    model_type = "mimo"


AutoConfig.register("mimo", MiMoConfig, exist_ok=True)


@register_model("mimo")
class MiMo(Qwen2Bridge):
    """MiMoForCausalLM without its layers for multi-token prediction."""
