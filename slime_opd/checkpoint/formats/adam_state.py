"""torch's Adam in Megatron's optimizer: its fused kernel, and loading its state from checkpoints."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


def _torch_adams(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron's optimizers that run torch's Adam: all, where neither Transformer Engine nor Apex is installed."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in chained if isinstance(one.optimizer, torch.optim.Adam | torch.optim.AdamW)]


def use_fused_kernel(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam update each parameter in one kernel.

    By default torch updates all parameters of a group together on a GPU, with temporaries of 4 bytes for each of them.
    """
    for one in _torch_adams(optimizer):
        for settings in (one.optimizer.defaults, *one.optimizer.param_groups):
            settings.update(fused=True, foreach=False)


def prepare_to_load(optimizer: MegatronOptimizer) -> None:
    """Make torch's Adam loadable by Megatron, whose loader does not expect the `step` in its state.

    The state is created as by Adam's first step, because the loader describes the existing state; and as the loader
    requires every key of it but provides no `step`, the existing `step` is added.
    """
    for one in _torch_adams(optimizer):
        for group in one.optimizer.param_groups:
            for parameter in group["params"]:
                one.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        one._set_main_param_and_optimizer_states = partial(_set_states, one)


def _set_states(one: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
    group, order = one.model_param_group_index_map[model_param]
    state = one.optimizer.state[one.optimizer.param_groups[group]["params"][order]]
    type(one)._set_main_param_and_optimizer_states(one, model_param, {"step": state["step"], **tensors})


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own `step`, on its device, where the fused kernel reads it.

    Megatron loads one tensor into all of them, and Adam would then increase it once for each parameter.
    """
    for one in _torch_adams(optimizer):
        for state in one.optimizer.state.values():
            state["step"] = state["step"].to(state["exp_avg"].device, copy=True)


def round_steps(optimizer: MegatronOptimizer) -> None:
    """Make the steps of the parameter groups integers, after a checkpoint was loaded.

    Transformer Engine's FusedAdam counts there and needs an integer, but the checkpoint may be from torch's Adam, whose
    steps are floats.
    """
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = int(group["step"])
