"""The experts of a mixture where Transformer Engine's grouped layers are not: one matrix product for each expert.

Parameters have the names and shapes of Transformer Engine's (`linear_fc1.weight0`, …), and the checkpoint's keys are its own; so
mbridge and torch_dist need to know of one kind of experts only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class _Weights(torch.nn.Module):
    """One matrix [outputs, inputs] for each expert of this rank."""

    def __init__(self, count: int, outputs: int, inputs: int, config: TransformerConfig) -> None:
        super().__init__()
        for number in range(count):
            weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
            config.init_method(weight)
            # Megatron's marks of a parameter whose gradient is summed over the ranks that hold the same expert, and that counts on
            # each rank: tensor-parallel ranks hold the same experts, but not the same shards of their gradients.
            weight.allreduce = False
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
            self.register_parameter(f"weight{number}", weight)


class LocalExperts(MegatronModule):
    """The experts of one rank; they are split over expert-parallel ranks, and not over tensor-parallel ones."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        *,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self._count, self._groups = num_local_experts, pg_collection
        width = config.moe_ffn_hidden_size or config.ffn_hidden_size
        outputs = 2 * width if config.gated_linear_unit else width
        self.linear_fc1 = _Weights(num_local_experts, outputs, config.hidden_size, config)
        self.linear_fc2 = _Weights(num_local_experts, config.hidden_size, width, config)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Tokens [T, H] in the experts' order, the number of each expert's, and the router's weight of each [T]."""
        sizes = tokens_per_expert.tolist()
        outputs = []
        for number, (own, weights) in enumerate(zip(tokens.split(sizes), probs.split(sizes), strict=True)):
            inner = F.linear(own, getattr(self.linear_fc1, f"weight{number}"))
            if self.config.gated_linear_unit:
                gate, value = inner.chunk(2, dim=-1)
                inner = self.config.activation_func(gate) * value
            else:
                inner = self.config.activation_func(inner)
            inner = (inner * weights[:, None]).to(inner.dtype)
            outputs.append(F.linear(inner, getattr(self.linear_fc2, f"weight{number}")))
        return torch.cat(outputs), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """Transformer Engine's keys: one tensor of all experts, each rank with its own."""
        first, total = self._groups.ep.rank() * self._count, self._groups.ep.size() * self._count
        axis, found = len(sharded_offsets), {}
        for layer in ("linear_fc1", "linear_fc2"):
            for number in range(self._count):
                found[f"{prefix}{layer}.weight{number}"] = ShardedTensor.from_rank_offsets(
                    f"{prefix}experts.{layer}.weight",
                    getattr(getattr(self, layer), f"weight{number}"),
                    *sharded_offsets,
                    (axis, first + number, total),
                    replica_id=(0, 0, self._groups.expt_dp.rank()),
                    prepend_axis_num=axis + 1,
                )
        return found

    def backward_dw(self) -> None:
        """There are no delayed weight gradients."""
