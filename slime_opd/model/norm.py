"""The norms of layers without Transformer Engine."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


class LocalNorm:
    """Torch's RMSNorm or LayerNorm, marked for sequence parallelism, which Megatron's own refuses.

    With sequence parallelism each tensor-parallel rank sees a part of the tokens; the mark has Megatron sum the gradients.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object
    ) -> torch.nn.Module:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
