"""Loads a checkpoint into this rank's model, optimizer, schedule and random state, whatever layout it was saved at."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from slime_opd.checkpoint.formats.adam_state import prepare_to_load, round_steps, separate_steps
from slime_opd.checkpoint.formats.architecture import check_hf_config, check_tensor_shapes
from slime_opd.checkpoint.formats.failures import reading
from slime_opd.checkpoint.formats.load_hugging_face import load_hugging_face
from slime_opd.checkpoint.formats.state import FULLY_RESHARDABLE, TrainingState, model_state, rng_state
from slime_opd.checkpoint.location import Location
from slime_opd.model.bridge import ModelBridge
from slime_opd.model.hidden_states import HiddenStatesModel


def load_weights(
    model: HiddenStatesModel, bridge: ModelBridge, location: Location, flag: str, *, any_vocabulary: bool = False
) -> None:
    """Copy the weights at `location`, torch_dist or Hugging Face, into the model. `flag` is named in errors.

    With `any_vocabulary` the number of vocabulary rows may differ: surplus rows are ignored, missing ones keep their
    values. Raises CheckpointError, with both shapes, where the architecture differs.
    """
    if location.is_hugging_face:
        check_hf_config(bridge, location, flag, any_vocabulary=any_vocabulary)
        load_hugging_face(model, bridge, str(location.directory), flag)
        return
    state = model_state(model)
    check_tensor_shapes(state, location, flag)
    loaded = _load({"model": state}, location, flag)
    model.load_state_dict(loaded["model"], strict=False)


def load_training_state(training: TrainingState, location: Location, flag: str = "--load") -> None:
    """Copy optimizer, schedule and random state at `location` into `training`."""
    weights = model_state(training.model)
    prepare_to_load(training.optimizer)
    state = {
        "optimizer": training.optimizer.sharded_state_dict(weights, is_loading=True, metadata=FULLY_RESHARDABLE),
        "scheduler": training.scheduler.state_dict(),
    }
    rng = rng_state()
    with reading(location, flag):
        saved = load_sharded_metadata(str(location.directory))
    # Random states belong to ranks of one layout; at another layout each rank starts from the seed.
    if rng.unique_key in saved:
        state["rng"] = rng
    loaded = _load(state, location, flag)
    training.optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(training.optimizer)
    round_steps(training.optimizer)
    training.scheduler.load_state_dict(loaded["scheduler"])
    if "rng" in loaded:
        torch.set_rng_state(loaded["rng"]["cpu"])
        get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])


def _load(state: dict[str, Any], location: Location, flag: str) -> dict[str, Any]:
    with reading(location, flag):
        return dist_checkpointing.load(state, str(location.directory), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
