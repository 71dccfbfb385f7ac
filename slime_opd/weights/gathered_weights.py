"""Exports a model's weights under Hugging Face's names, gathered whole on every rank.

Names and shapes are exchanged once, when GatheredWeights is created. An export then communicates tensors only: over
pipeline stages, expert-parallel and tensor-parallel ranks, and nothing where each of these is one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from slime_opd.checkpoint.formats.tensors import own_storage
from slime_opd.model import device
from slime_opd.model.bridge import ModelBridge
from slime_opd.model.hidden_states import HiddenStatesModel

_EXPERT = ".mlp.experts.linear_fc"


@dataclass(frozen=True)
class _Parameter:
    """A parameter of one pipeline stage: its name there and in the whole model, shape and dtype of a rank's shard."""

    stage: int
    local_name: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    # The axis that tensor parallelism splits; None where every tensor-parallel rank has the whole parameter.
    split_axis: int | None


class GatheredWeights:
    """Iterates over a model's present weights as (Hugging Face name, tensor), gathering one at a time.

    Creating it and iterating over it, to the end, are collectives of all ranks.
    """

    def __init__(self, model: HiddenStatesModel, bridge: ModelBridge) -> None:
        self._model, self._bridge = model, bridge
        own = self._own_parameters()
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        per_stage = [own] * stages
        if stages > 1:
            dist.all_gather_object(per_stage, own, group=parallel_state.get_pipeline_model_parallel_group())
        self._parameters = [parameter for stage in per_stage for parameter in stage]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        own = _tensors(self._model)
        seen: set[str] = set()
        for parameter in self._parameters:
            for name, value in self._whole(parameter, own):
                for hf_name, tensor in self._bridge.to_hugging_face(name, value):
                    # With pipeline stages a tied embedding comes once for each end of the model.
                    if hf_name in seen or (self._bridge.is_tied and hf_name == "lm_head.weight"):
                        continue
                    seen.add(hf_name)
                    # A slice (of a padded vocabulary, of a fused projection) would take its whole storage to disk or to
                    # an engine.
                    yield hf_name, own_storage(tensor)

    def _own_parameters(self) -> list[_Parameter]:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        # Local names count layers and experts from 0; experts get their global index when they are gathered.
        names = self._bridge.global_names(self._model, with_global_experts=False)
        return [
            _Parameter(
                stage,
                local_name,
                names[local_name],
                tuple(tensor.shape),
                tensor.dtype,
                getattr(tensor, "partition_dim", None) if getattr(tensor, "tensor_model_parallel", False) else None,
            )
            for local_name, tensor in _tensors(self._model).items()
        ]

    def _whole(self, parameter: _Parameter, own: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The whole parameter and its global name; for an expert's, those at the same local index on all ranks."""
        is_gated = self._bridge.config.gated_linear_unit
        if parameter.stage == parallel_state.get_pipeline_model_parallel_rank():
            shard = own[parameter.local_name].detach()
        else:
            shard = torch.empty(parameter.shape, dtype=parameter.dtype, device=device.device())
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            stages = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(shard, dist.get_global_rank(stages, parameter.stage), group=stages)
        if _EXPERT not in parameter.name:
            shards = [shard]
            if parameter.split_axis is not None:
                shards = _all_gather(shard, parallel_state.get_tensor_model_parallel_group())
            yield parameter.name, merge_shards(parameter.name, shards, parameter.split_axis, is_gated=is_gated)
            return
        prefix, _, local_index = parameter.name.rpartition("weight")
        per_rank = _all_gather(shard, parallel_state.get_expert_model_parallel_group())
        experts = self._bridge.config.num_moe_experts // len(per_rank)
        for rank, expert in enumerate(per_rank):
            shards = _all_gather(expert, parallel_state.get_expert_tensor_parallel_group())
            yield (
                f"{prefix}weight{experts * rank + int(local_index)}",
                merge_shards(parameter.name, shards, parameter.split_axis, is_gated=is_gated),
            )


def merge_shards(name: str, shards: list[Tensor], split_axis: int | None, *, is_gated: bool) -> Tensor:
    """A parameter from its tensor-parallel shards, in rank order.

    `is_gated`: an MLP's first matrix holds gate and up projection.
    """
    if len(shards) == 1:
        return shards[0]
    if ".linear_fc1." in name and is_gated:
        # Each rank has its part of the gate above its part of the up projection.
        halves = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([part for half in halves for part in half])
    # Transformer Engine's experts are not marked with the axis that they are split on.
    axis = int(".linear_fc2." in name) if _EXPERT in name else split_axis
    if axis is None:
        raise ValueError(f"{name} has {len(shards)} shards and no axis that it is split on")
    return torch.cat(shards, dim=axis)


def _tensors(model: HiddenStatesModel) -> dict[str, Tensor]:
    """The exported tensors of a model: its parameters, and the routers' selection biases, which are buffers."""
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith(".expert_bias")}
    return dict(model.named_parameters()) | biases


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The tensors of all ranks of a group, in rank order; without communication in a group of one rank."""
    if group.size() == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(gathered, tensor, group=group)
    return gathered
