"""The norm of layers without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


class LocalNorm:
    """Makes torch's RMSNorm or LayerNorm, marked for sequence parallelism, which Megatron's own wrapper refuses.

    With sequence parallelism each tensor-parallel rank has a part of the tokens; the mark makes Megatron sum the
    gradients. It is a class because layer specs take classes.
    """

    def __new__(  # type: ignore[misc]  # as Megatron's WrappedTorchNorm: it makes an instance of another class
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object
    ) -> torch.nn.Module:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm: Any = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
