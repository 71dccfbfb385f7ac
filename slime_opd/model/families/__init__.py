"""Model families: one file for each family that mbridge lacks or configures wrongly; all others are mbridge's."""

from __future__ import annotations

import torch
from mbridge import AutoBridge
from mbridge.core.bridge import Bridge
from mbridge.core.parallel_states import ParallelStates
from transformers import AutoConfig, PretrainedConfig

from slime_opd.errors import ConfigError

# Importing a file registers its family, instead of mbridge's if there is one.
from slime_opd.model.families import deepseek_v3, glm4, glm4_moe, mimo, mixtral

__all__ = ["deepseek_v3", "glm4", "glm4_moe", "make_mbridge", "mimo", "mixtral"]


def make_mbridge(directory: str, dtype: torch.dtype, layout: ParallelStates | None = None) -> Bridge:
    """mbridge's bridge for the family of a Hugging Face directory, at a parallel layout (default: this rank's).

    Raises ConfigError for a family that neither mbridge nor this package knows.
    """
    try:
        hf_config = read_config(directory)
        return AutoBridge.from_config(hf_config, dtype=dtype, parallel_states=layout)
    except ValueError as error:
        raise ConfigError(f"--hf-checkpoint {directory}: {error}") from error


def read_config(directory: str) -> PretrainedConfig:
    """The config of a Hugging Face directory, with rotary settings under the names of transformers 4."""
    # By default transformers asks at the terminal whether to run a directory's own code: never run it.
    hf_config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    # transformers 5 moved all rotary settings into `rope_parameters`.
    rotary = getattr(hf_config, "rope_parameters", None) or {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rotary and not hasattr(hf_config, name):
            setattr(hf_config, name, rotary[name])
    if getattr(hf_config, "head_dim", 0) is None:
        hf_config.head_dim = hf_config.hidden_size // hf_config.num_attention_heads
    return hf_config
