"""The state of a training run as Megatron saves it: model, optimizer, schedule, random state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from slime_opd.model.hidden_states import HiddenStatesModel

FULLY_RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gathered in host memory, by the first data-parallel rank alone. By default every rank gathers all of it through
    # the GPU, in two copies of the float32 weights (31 GiB more for 8B parameters at TP=2), just when the memory is
    # full.
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


@dataclass(frozen=True)
class TrainingState:
    """What a resumed run continues from, beside its position in the prompts."""

    model: HiddenStatesModel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def model_state(model: HiddenStatesModel) -> dict[str, Any]:
    """The model's sharded tensors, by parameter."""
    # Transformer Engine's `_extra_state` carries FP8 scales only; leaving it out makes one checkpoint fit both layer
    # specs.
    return {key: value for key, value in model.sharded_state_dict().items() if "_extra_state" not in key}


def state_to_save(model: HiddenStatesModel, training: TrainingState | None, iteration: int | None) -> dict[str, Any]:
    """The contents of a checkpoint, with the optimizer's state gathered over the data-parallel ranks. A collective."""
    weights = model_state(model)
    state: dict[str, Any] = {"model": weights, "iteration": iteration or 0}
    if training is not None:
        state["optimizer"] = training.optimizer.sharded_state_dict(weights, metadata=FULLY_RESHARDABLE)
        state["scheduler"] = training.scheduler.state_dict()
        state["rng"] = rng_state()
    return state


def rng_state() -> ShardedObject:
    """The random state of this rank."""
    ranks = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    )
    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    return ShardedObject("rng", state, sizes, ranks)
