"""What is in a checkpoint: Megatron's torch_dist format, and Hugging Face directories to start from.

Where checkpoints lie, and how one takes its name, is `slime_opd/checkpoint/directory.py`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mbridge.core.bridge import Bridge
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from slime_opd.checkpoint import disk, trusted
from slime_opd.checkpoint.directory import RUN_STATE, Location, find, publish, remove_old
from slime_opd.checkpoint.formats.adam_state import prepare_to_load, round_steps, separate_steps
from slime_opd.checkpoint.formats.load_hugging_face import load_hugging_face
from slime_opd.checkpoint.formats.verification import gather, on_first_rank, write_manifest
from slime_opd.checkpoint.formats.writer import write_in_this_process
from slime_opd.checkpoint.manifest import MANIFEST
from slime_opd.checkpoint.tokenizer import copy_tokenizer
from slime_opd.checkpoint.whole import refusal
from slime_opd.config.hf_config import ARCHITECTURE_KEYS
from slime_opd.errors import CheckpointError
from slime_opd.model.builder import HiddenStatesModel

_FULLY_RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gathered in host memory, by the first data-parallel rank alone. By default every rank gathers all of it through the GPU, in
    # two copies of the float32 weights (31 GiB more for 8B parameters at TP=2), just when the memory is full.
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


@dataclass(frozen=True)
class TrainingState:
    """All that a resumed run continues from, beside the data cursor."""

    model: HiddenStatesModel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def load_weights(
    model: HiddenStatesModel, bridge: Bridge, location: Location, flag: str, *, any_vocabulary: bool = False
) -> None:
    """Copy the weights at `location` into the model, whatever layout they were saved at.

    Raises CheckpointError, with both shapes, where they are of another architecture. With `any_vocabulary` the number of
    vocabulary rows may differ: those that the model has no place for are left out, those that are not there stay as they are.
    """
    if location.is_hugging_face:
        _check_hugging_face(bridge, location, flag, any_vocabulary)
        load_hugging_face(model, bridge, str(location.directory), flag)
        return
    state = model_state(model)
    _check_shapes(state, location, flag)
    loaded = _load({"model": state}, location, flag)
    model.load_state_dict(loaded["model"], strict=False)


def _load(state: dict[str, Any], location: Location, flag: str) -> dict[str, Any]:
    with _reading(location, flag):
        return dist_checkpointing.load(state, str(location.directory), strict=StrictHandling.ASSUME_OK_UNEXPECTED)


# torch reads this at every load: pickles may then make tensors and plain values only, whatever its caller asks for.
_SAFE_LOADS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def _reading(location: Location, flag: str) -> Iterator[None]:
    """Read a checkpoint without running code that it holds; what cannot be read is a CheckpointError on every rank."""
    before = os.environ.get(_SAFE_LOADS)
    os.environ[_SAFE_LOADS] = "1"
    try:
        with _quiet("torch.distributed.checkpoint"):
            trusted.check_metadata(location.directory)
            _read_common(location.directory)
            yield
    except CheckpointError as error:
        raise CheckpointError(refusal(location, flag, [str(error)])) from error
    except (CheckpointException, CheckpointingException, OSError) as error:
        raise CheckpointError(refusal(location, flag, [_reason(error)])) from error
    finally:
        if before is None:
            del os.environ[_SAFE_LOADS]
        else:
            os.environ[_SAFE_LOADS] = before


def _read_common(directory: Path) -> None:
    """Raise CheckpointError where common.pt, which every rank reads by itself, cannot be read."""
    try:
        torch.load(directory / "common.pt", map_location="cpu", weights_only=True)
    # A damaged archive raises what it likes.
    except Exception as error:
        raise CheckpointError(f"common.pt: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Why a checkpoint could not be read or written, in a line, out of the reports that torch and Megatron wrap it in."""
    text = str(error)
    if match := re.search(r"(?i)unsupported (?:global: )?GLOBAL (\S+)", text):
        return f"it names {match[1]}, which no checkpoint needs: reading it could run code, so it is refused"
    if match := re.search(r"\[Errno \d+\] ([^:\n]+)", text):
        return match[1]
    if re.search(r"PytorchStreamWriter failed writing|unexpected pos", text):
        return "the file system does not take all of it"
    if re.search(r"Weights only load failed|PytorchStreamReader|failed finding central directory", text):
        return "its contents are damaged"
    last = next((line for line in reversed(text.splitlines()) if line.strip()), type(error).__name__)
    return f"it cannot be read ({last.strip()[:160]})"


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library from logging a failure that is raised as well."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def vocabulary_rows(location: Location) -> int:
    """Rows of the vocabulary at `location`; with padding, in a Megatron checkpoint."""
    if location.is_hugging_face:
        return int(json.loads((location.directory / "config.json").read_text())["vocab_size"])
    saved = _saved_tensors(location)
    return int(saved["embedding.word_embeddings.weight"].global_shape[0])


def _saved_tensors(location: Location) -> dict[str, Any]:
    """Every tensor of a torch_dist checkpoint, without its values. Raises CheckpointError where `.metadata` is not to be read."""
    trusted.check_metadata(location.directory)
    try:
        return dist_checkpointing.load_tensors_metadata(str(location.directory))
    except CheckpointingException as error:
        raise CheckpointError(f"{location.directory} {_reason(error)}") from error


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
    saved = _saved_tensors(location)
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


def load_training_state(state: TrainingState, location: Location, flag: str = "--load") -> None:
    """Copy optimizer, schedule and random state at `location` into `state`."""
    of_model = model_state(state.model)
    prepare_to_load(state.optimizer)
    wanted = {
        "optimizer": state.optimizer.sharded_state_dict(of_model, is_loading=True, metadata=_FULLY_RESHARDABLE),
        "scheduler": state.scheduler.state_dict(),
    }
    rng = _rng_state()
    with _reading(location, flag):
        saved = load_sharded_metadata(str(location.directory))
    # Random states belong to ranks of one layout; at another layout each rank starts from the seed.
    if rng.unique_key in saved:
        wanted["rng"] = rng
    loaded = _load(wanted, location, flag)
    state.optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(state.optimizer)
    round_steps(state.optimizer)
    state.scheduler.load_state_dict(loaded["scheduler"])
    if "rng" in loaded:
        torch.set_rng_state(loaded["rng"]["cpu"])
        get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])


def save(
    root: str,
    iteration: int | None,
    model: HiddenStatesModel,
    training: TrainingState | None,
    run_state: dict[str, Any],
    keep: int = 0,
    tokenizer: str | None = None,
) -> Path:
    """Write one checkpoint, on all ranks together; `iteration` None writes a release of weights only.

    The tokenizer of the Hugging Face directory `tokenizer` is kept beside the weights. Raises CheckpointError where the checkpoint
    cannot be written; what there is of it is removed, and the one before it stays what the tracker file names.
    """
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    partial = Path(root) / f"{name}.partial"
    state = state_to_save(model, training, iteration)
    needed = sum(gather(_own_bytes(state)))

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        disk.check_room(Path(root), name, needed)

    def add_companions() -> None:
        (partial / RUN_STATE).write_text(json.dumps({**run_state, "manifest": MANIFEST}, indent=1))
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)

    def finish() -> Path:
        final = publish(partial)
        remove_old(Path(root), keep)
        return final

    with writing(partial, needed):
        on_first_rank(begin)
        write_in_this_process()
        dist_checkpointing.save(state, str(partial))
        on_first_rank(add_companions)
        write_manifest(partial)
        return on_first_rank(finish)


def state_to_save(model: HiddenStatesModel, training: TrainingState | None, iteration: int | None) -> dict[str, Any]:
    """All that a checkpoint holds, with the optimizer's state gathered over the data-parallel ranks. A collective."""
    weights = model_state(model)
    state: dict[str, Any] = {"model": weights, "iteration": iteration or 0}
    if training is not None:
        state["optimizer"] = training.optimizer.sharded_state_dict(weights, metadata=_FULLY_RESHARDABLE)
        state["scheduler"] = training.scheduler.state_dict()
        state["rng"] = _rng_state()
    return state


def _own_bytes(state: dict[str, Any]) -> int:
    """Bytes of the tensors of `state` that this rank writes."""
    values = [value for value in nested_values(state) if getattr(value, "data", None) is not None]
    own = [v for v in values if hasattr(v, "replica_id") and is_main_replica(v.replica_id)]
    return sum(value.data.nbytes for value in own if isinstance(value.data, Tensor))


@contextmanager
def writing(partial_directory: Path, needed: int) -> Iterator[None]:
    """Turn a failure to write a checkpoint into a CheckpointError, and remove what there is of it.

    Megatron raises a writer's failure on all ranks, but its reason on the first; one of the first rank's own files ends that rank
    alone, and the run with it.
    """
    root, name = partial_directory.parent, partial_directory.stem
    try:
        with _quiet("megatron.core.dist_checkpointing"):
            yield
    except CheckpointError:
        _remove(partial_directory)
        raise
    except (OSError, RuntimeError, CheckpointException) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        _remove(partial_directory)
        sentence = disk.not_written(root, name, needed, _reason(error))
        if isinstance(error, CheckpointException):
            sentence = gather(sentence)[0]
        raise CheckpointError(sentence) from error


def _remove(directory: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)


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


def _check_shapes(state: dict[str, Any], location: Location, flag: str) -> None:
    saved = _saved_tensors(location)
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


def _check_hugging_face(bridge: Bridge, location: Location, flag: str, any_vocabulary: bool) -> None:
    found = json.loads((location.directory / "config.json").read_text())
    expected = bridge.hf_config.to_dict()
    problems = [
        f"{key} is {found[key]} there and {expected[key]} in the student"
        for key in ARCHITECTURE_KEYS
        if None not in (found.get(key), expected.get(key)) and found[key] != expected[key]
        if not (any_vocabulary and key == "vocab_size")
    ]
    if problems:
        raise CheckpointError(f"{flag} {location.directory} is of another architecture: {'; '.join(problems)}")
