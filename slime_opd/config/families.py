"""The model families that can be trained, by `model_type` of a Hugging Face config.json.

docs/models.md has what was tested of each; slime_opd/model/families has the code. A test keeps the three equal.
"""

from __future__ import annotations

SUPPORTED = (
    "deepseek_v3",
    "glm4",
    "glm4_moe",
    "llama",
    "mimo",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)

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
