"""MoE experts without Transformer Engine's grouped layers: one matrix product for each expert.

Names and shapes of parameters (`linear_fc1.weight0`, …) and keys of checkpoints are those of Transformer Engine's
grouped layers, so that mbridge and torch_dist handle both alike.
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

    def __init__(self, num_experts: int, outputs: int, inputs: int, config: TransformerConfig) -> None:
        super().__init__()
        for index in range(num_experts):
            weight: Any = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
            config.init_method(weight)
            # Megatron's marks: the gradient is summed over the ranks with the same expert, and its norm counts on each
            # rank, because tensor-parallel ranks have different shards of it.
            weight.allreduce = False
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
            self.register_parameter(f"weight{index}", weight)


class LocalExperts(MegatronModule):
    """The experts of one rank: split over expert-parallel ranks, not over tensor-parallel ones."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        *,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self._num_experts, self._groups = num_local_experts, pg_collection
        width = config.moe_ffn_hidden_size or config.ffn_hidden_size
        outputs = 2 * width if config.gated_linear_unit else width
        self.linear_fc1 = _Weights(num_local_experts, outputs, config.hidden_size, config)
        self.linear_fc2 = _Weights(num_local_experts, config.hidden_size, width, config)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Run the experts: tokens [T, H] sorted by expert, their number per expert, router weights [T] -> [T, H]."""
        sizes = tokens_per_expert.tolist()
        outputs = []
        for index, (own, weights) in enumerate(zip(tokens.split(sizes), probs.split(sizes), strict=True)):
            inner = F.linear(own, getattr(self.linear_fc1, f"weight{index}"))
            if self.config.gated_linear_unit:
                gate, value = inner.chunk(2, dim=-1)
                inner = self.config.activation_func(gate) * value
            else:
                inner = self.config.activation_func(inner)
            inner = (inner * weights[:, None]).to(inner.dtype)
            outputs.append(F.linear(inner, getattr(self.linear_fc2, f"weight{index}")))
        return torch.cat(outputs), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """Sharded tensors under Transformer Engine's keys: one tensor of all experts; each rank has its own."""
        first, total = self._groups.ep.rank() * self._num_experts, self._groups.ep.size() * self._num_experts
        axis, state = len(sharded_offsets), {}
        for layer in ("linear_fc1", "linear_fc2"):
            for index in range(self._num_experts):
                state[f"{prefix}{layer}.weight{index}"] = ShardedTensor.from_rank_offsets(
                    f"{prefix}experts.{layer}.weight",
                    getattr(getattr(self, layer), f"weight{index}"),
                    *sharded_offsets,
                    (axis, first + index, total),
                    replica_id=(0, 0, self._groups.expt_dp.rank()),
                    prepend_axis_num=axis + 1,
                )
        return state

    def backward_dw(self) -> None:
        """Do nothing: weight gradients are never delayed."""
