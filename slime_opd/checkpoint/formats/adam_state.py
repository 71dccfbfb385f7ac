"""torch's own Adam in Megatron's optimizer: its kernel, and its state in checkpoints, whose loader expects Transformer Engine's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


def _torch_adams(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron's optimizers that run torch's own Adam, as they do where neither Transformer Engine nor Apex is."""
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
    """Make Megatron able to load into torch's Adam, whose state holds a `step` that Megatron's loader does not expect.

    The state is made as Adam's first step would make it, because only state that is there can be described; and the
    loader, which asks for every key of that state but is not given `step`, is handed the one that is there.
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
    """Give every parameter a `step` of its own, on its device, where the fused kernel reads it.

    Megatron loads one tensor into all, which Adam would then count up once for each.
    """
    for one in _torch_adams(optimizer):
        for state in one.optimizer.state.values():
            state["step"] = state["step"].to(state["exp_avg"].device, copy=True)


def round_steps(optimizer: MegatronOptimizer) -> None:
    """Make the steps of the parameter groups whole numbers, after a checkpoint was loaded.

    Transformer Engine's FusedAdam counts there, and its kernel takes an integer; torch's Adam, which counts in floating point, may
    have written the checkpoint.
    """
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = int(group["step"])
