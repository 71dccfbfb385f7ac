"""Checkpoints: Megatron's torch_dist format, and Hugging Face directories to start from.

A checkpoint directory holds `iter_0000010/` (or `release/`) and `latest_checkpointed_iteration.txt`, as Megatron-LM writes
them. A step is written under a name that no reader looks at, then renamed, and only then named in the tracker file; so a kill at
any moment leaves the previous checkpoint valid.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mbridge.core.bridge import Bridge
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from slime_opd.errors import CheckpointError
from slime_opd.megatron.model import HiddenStatesModel

TRACKER = "latest_checkpointed_iteration.txt"
RUN_STATE = "run_state.json"
_FULLY_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class Location:
    """One checkpoint on disk. `iteration` is None for a release or a Hugging Face directory."""

    directory: Path
    iteration: int | None
    is_hugging_face: bool = False


@dataclass(frozen=True)
class TrainingState:
    """All that a resumed run continues from, beside the data cursor."""

    model: HiddenStatesModel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def find(path: str, step: int | None = None) -> Location | None:
    """The checkpoint that `path` means, or None where there is none yet.

    `path` may be a directory with a tracker file, one iteration's directory, or a Hugging Face directory. Raises
    CheckpointError when a step is asked for that is not there, or the tracker names one that is not there.
    """
    root = Path(path)
    if (root / ".metadata").is_file():
        return Location(root, _iteration_of(root.name))
    if step is not None:
        return _existing(root, step)
    if (root / TRACKER).is_file():
        named = (root / TRACKER).read_text().strip()
        if named == "release":
            return Location(root / "release", None)
        if not named.isdigit():
            raise CheckpointError(f"{root / TRACKER} holds {named!r}, expected a step number or 'release'")
        return _existing(root, int(named))
    if (root / "config.json").is_file():
        return Location(root, None, is_hugging_face=True)
    return None


def require(path: str, flag: str, step: int | None = None) -> Location:
    """`find`, where a missing checkpoint is an error that names the flag."""
    location = find(path, step)
    if location is None:
        raise CheckpointError(
            f"{flag} {path}: no checkpoint there; expected a {TRACKER}, an iter_… directory or a Hugging Face directory"
        )
    return location


def load_weights(
    model: HiddenStatesModel, bridge: Bridge, location: Location, flag: str, *, any_vocabulary: bool = False
) -> None:
    """Copy the weights at `location` into the model, whatever layout they were saved at.

    Raises CheckpointError, with both shapes, where they are of another architecture. With `any_vocabulary` the number of
    vocabulary rows may differ: those that the model has no place for are left out, those that are not there stay as they are.
    """
    if location.is_hugging_face:
        _check_hugging_face(bridge, location, flag, any_vocabulary)
        # One weight at a time: by default all of this rank's would be in memory beside the model.
        bridge.load_weights([model], str(location.directory), memory_efficient=True)
        return
    state = model_state(model)
    _check_shapes(state, location, flag)
    loaded = dist_checkpointing.load(
        {"model": state}, str(location.directory), strict=StrictHandling.ASSUME_OK_UNEXPECTED
    )
    model.load_state_dict(loaded["model"], strict=False)


def vocabulary_rows(location: Location) -> int:
    """Rows of the vocabulary at `location`; with padding, in a Megatron checkpoint."""
    if location.is_hugging_face:
        return int(json.loads((location.directory / "config.json").read_text())["vocab_size"])
    saved = dist_checkpointing.load_tensors_metadata(str(location.directory))
    return int(saved["embedding.word_embeddings.weight"].global_shape[0])


def shapes_at(path: str) -> dict[str, int]:
    """Layers and widths of the checkpoint at `path`, under Hugging Face's names; {} where there is none yet."""
    location = find(path)
    if location is None:
        return {}
    if location.is_hugging_face:
        config = json.loads((location.directory / "config.json").read_text())
        return {
            name: config[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size") if name in config
        }
    saved = dist_checkpointing.load_tensors_metadata(str(location.directory))
    shapes = {key: tuple(tensor.global_shape) for key, tensor in saved.items()}
    # Layers of one kind are one tensor; where they differ, each has its own.
    numbered = {int(key.split(".")[2]) for key in shapes if re.match(r"decoder\.layers\.\d", key)}
    found = {"num_hidden_layers": len(numbered)} if numbered else {}
    where = {
        "num_hidden_layers": ("decoder.layers.self_attention.linear_proj.weight", 0),
        "hidden_size": ("embedding.word_embeddings.weight", 1),
        "intermediate_size": ("mlp.linear_fc2.weight", -1),
        "moe_intermediate_size": ("mlp.experts.experts.linear_fc2.weight", -1),
    }
    for name, (ending, axis) in where.items():
        key = next((key for key in shapes if key.endswith(ending) and not key.startswith("optimizer.")), None)
        if key is not None:
            found[name] = shapes[key][axis]
    return found


def load_training_state(state: TrainingState, location: Location) -> None:
    """Copy optimizer, schedule and random state at `location` into `state`."""
    of_model = model_state(state.model)
    _prepare_to_load(state.optimizer)
    wanted = {
        "optimizer": state.optimizer.sharded_state_dict(of_model, is_loading=True, metadata=_FULLY_RESHARDABLE),
        "scheduler": state.scheduler.state_dict(),
    }
    rng = _rng_state()
    saved = load_sharded_metadata(str(location.directory))
    # Random states belong to ranks of one layout; at another layout each rank starts from the seed.
    if rng.unique_key in saved:
        wanted["rng"] = rng
    loaded = dist_checkpointing.load(wanted, str(location.directory), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    state.optimizer.load_state_dict(loaded["optimizer"])
    _separate_steps(state.optimizer)
    state.scheduler.load_state_dict(loaded["scheduler"])
    if "rng" in loaded:
        torch.set_rng_state(loaded["rng"]["cpu"])
        get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])


def read_run_state(location: Location) -> dict[str, Any]:
    """The driver's state saved beside the weights: step and data cursor; empty where there is none."""
    path = location.directory / RUN_STATE
    return json.loads(path.read_text()) if path.is_file() else {}


def save(
    root: str,
    iteration: int | None,
    model: HiddenStatesModel,
    training: TrainingState | None,
    run_state: dict[str, Any],
    keep: int = 0,
) -> Path:
    """Write one checkpoint, on all ranks together; `iteration` None writes a release of weights only."""
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    partial = Path(root) / f"{name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    of_model = model_state(model)
    state: dict[str, Any] = {"model": of_model, "iteration": iteration or 0}
    if training is not None:
        state["optimizer"] = training.optimizer.sharded_state_dict(of_model, metadata=_FULLY_RESHARDABLE)
        state["scheduler"] = training.scheduler.state_dict()
        state["rng"] = _rng_state()
    dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        (partial / RUN_STATE).write_text(json.dumps(run_state, indent=1))
        publish(partial)
        _remove_old(Path(root), keep)
    dist.barrier()
    return partial.with_suffix("")


def publish(partial: Path) -> Path:
    """Give a complete `NAME.partial` its name, and name it in the tracker file."""
    root, final = partial.parent, partial.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    tracker = root / f"{TRACKER}.partial"
    iteration = _iteration_of(final.name)
    tracker.write_text("release" if iteration is None else str(iteration))
    tracker.rename(root / TRACKER)
    return final


def _torch_adams(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron's optimizers that run torch's own Adam, as they do where neither Transformer Engine nor Apex is."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in chained if isinstance(one.optimizer, torch.optim.Adam | torch.optim.AdamW)]


def _prepare_to_load(optimizer: MegatronOptimizer) -> None:
    """Make Megatron able to load into torch's Adam, whose state holds a `step` that Megatron's loader does not expect.

    The state is made as Adam's first step would make it, because only state that is there can be described; and the
    loader, which asks for every key of that state but is not given `step`, is handed the one that is there.
    """
    for one in _torch_adams(optimizer):
        for group in one.optimizer.param_groups:
            for parameter in group["params"]:
                one.optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        one._set_main_param_and_optimizer_states = partial(_set_states, one)


def _set_states(one: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
    group, order = one.model_param_group_index_map[model_param]
    state = one.optimizer.state[one.optimizer.param_groups[group]["params"][order]]
    type(one)._set_main_param_and_optimizer_states(one, model_param, {"step": state["step"], **tensors})


def _separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a `step` of its own: Megatron loads one tensor into all, which Adam would then count up once for each."""
    for one in _torch_adams(optimizer):
        for state in one.optimizer.state.values():
            state["step"] = state["step"].clone()


def model_state(model: HiddenStatesModel) -> dict[str, Any]:
    """The model's tensors as Megatron saves them, by parameter."""
    # Transformer Engine's `_extra_state` carries FP8 scales only; leaving it out makes one checkpoint fit both layer specs.
    return {key: value for key, value in model.sharded_state_dict().items() if "_extra_state" not in key}


def _rng_state() -> ShardedObject:
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


def _iteration_of(name: str) -> int | None:
    digits = name.removeprefix("iter_")
    return int(digits) if digits.isdigit() else None


def _existing(root: Path, step: int) -> Location:
    directory = root / f"iter_{step:07d}"
    if not (directory / ".metadata").is_file():
        found = sorted(path.name for path in root.glob("iter_*") if (path / ".metadata").is_file())
        raise CheckpointError(f"{directory}: no complete checkpoint there; found {', '.join(found) or 'none'}")
    return Location(directory, step)


def _remove_old(root: Path, keep: int) -> None:
    complete = sorted(path for path in root.glob("iter_*") if (path / ".metadata").is_file())
    for path in complete[:-keep] if keep else []:
        shutil.rmtree(path)


def _check_shapes(state: dict[str, Any], location: Location, flag: str) -> None:
    saved = dist_checkpointing.load_tensors_metadata(str(location.directory))
    problems = []
    for value in state.values():
        if not isinstance(value, ShardedTensor):
            continue
        if value.key not in saved:
            problems.append(f"{value.key} is missing")
        elif tuple(saved[value.key].global_shape) != tuple(value.global_shape) and not value.allow_shape_mismatch:
            found, expected = tuple(saved[value.key].global_shape), tuple(value.global_shape)
            problems.append(f"{value.key} is {list(found)} there and {list(expected)} in the student")
    if problems:
        raise CheckpointError(
            f"{flag} {location.directory} is of another architecture: {'; '.join(problems[:3])} ({len(problems)} differences)"
        )


_ARCHITECTURE_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)


def _check_hugging_face(bridge: Bridge, location: Location, flag: str, any_vocabulary: bool) -> None:
    found = json.loads((location.directory / "config.json").read_text())
    expected = bridge.hf_config.to_dict()
    problems = [
        f"{key} is {found[key]} there and {expected[key]} in the student"
        for key in _ARCHITECTURE_KEYS
        if None not in (found.get(key), expected.get(key)) and found[key] != expected[key]
        if not (any_vocabulary and key == "vocab_size")
    ]
    if problems:
        raise CheckpointError(f"{flag} {location.directory} is of another architecture: {'; '.join(problems)}")
