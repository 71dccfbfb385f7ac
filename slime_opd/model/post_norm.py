"""A norm after a layer's attention or MLP, before the residual: GLM-4 has them, Megatron's layer specs do not."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

# Names in the model, and in a torch_dist checkpoint, where they are slime's.
POST_NORMS = {
    "self_attention.linear_proj.post_layernorm.": "post_self_attn_layernorm.",
    "mlp.linear_fc2.post_layernorm.": "post_mlp_layernorm.",
}


@cache
def with_post_norm(linear: type, norm: type) -> type:
    """The class of the row-parallel layer `linear` followed by a norm of its whole output."""

    class PostNormed(linear):  # type: ignore[misc, valid-type]  # the base class is an argument
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
            super().__init__(input_size, output_size, config=config, **options)
            self.post_layernorm: torch.nn.Module = norm(
                config=config, hidden_size=output_size, eps=config.layernorm_epsilon
            )

        def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
            output, bias = super().forward(hidden)
            return self.post_layernorm(output if bias is None else output + bias), None

    return PostNormed
