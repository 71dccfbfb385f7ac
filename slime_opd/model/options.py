"""The user's Megatron options as arguments of Megatron-core's dataclasses."""

from __future__ import annotations

from typing import Any

import torch

from slime_opd.config import Config
from slime_opd.config.megatron_options import DTYPES, megatron_fields, values_for
from slime_opd.config.megatron_support import NOT_PASSED, OF_MODEL

_DTYPES = dict(zip(DTYPES, (torch.float32, torch.bfloat16, torch.float16, torch.uint8), strict=True))


def settings(config: Config, part: str) -> dict[str, Any]:
    """Fields that the user has set, of a part: transformer, latent_attention, optimizer or gradients.

    In bridge mode without those of the architecture, which comes from the Hugging Face config.
    """
    skip = NOT_PASSED | OF_MODEL if config.model.megatron_to_hf_mode == "bridge" else NOT_PASSED
    return {
        # Megatron stores fp8 state as bytes with a scale.
        name: _DTYPES[value] if "torch.dtype" in megatron_fields()[name].annotation else value
        for name, value in values_for(config.megatron, part, skip).items()
    }
