"""The architecture of a checkpoint, read from its metadata or config.json alone, and compared with the student's."""

from __future__ import annotations

import re
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from slime_opd.checkpoint import safe_metadata
from slime_opd.checkpoint.directory import find
from slime_opd.checkpoint.formats.failures import reason
from slime_opd.checkpoint.location import Location
from slime_opd.config.hf_config import ARCHITECTURE_KEYS, read_hf_config
from slime_opd.errors import CheckpointError
from slime_opd.model.bridge import ModelBridge

_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size")
# The tensor (its key's end) and the axis that have each size.
_SIZES_IN_TENSORS = {
    "num_hidden_layers": ("decoder.layers.self_attention.linear_proj.weight", 0),
    "hidden_size": ("embedding.word_embeddings.weight", 1),
    "intermediate_size": ("mlp.linear_fc2.weight", -1),
    "moe_intermediate_size": ("mlp.experts.experts.linear_fc2.weight", -1),
}


def vocabulary_rows(location: Location) -> int:
    """Rows of the vocabulary at `location`; with padding, in a Megatron checkpoint."""
    if location.is_hugging_face:
        return int(_hf_config(location)["vocab_size"])
    return int(_tensor_metadata(location)["embedding.word_embeddings.weight"].global_shape[0])


def sizes_at(path: str) -> dict[str, int]:
    """Layers and widths of the checkpoint at `path`, under Hugging Face's names; {} where there is none yet."""
    location = find(path)
    if location is None:
        return {}
    if location.is_hugging_face:
        config = _hf_config(location)
        return {name: config[name] for name in _SIZES if name in config}
    shapes = {key: tuple(tensor.global_shape) for key, tensor in _tensor_metadata(location).items()}
    # Layers of one kind are one tensor; where they differ, each has its own.
    layers = {int(key.split(".")[2]) for key in shapes if re.match(r"decoder\.layers\.\d", key)}
    sizes = {"num_hidden_layers": len(layers)} if layers else {}
    for name, (ending, axis) in _SIZES_IN_TENSORS.items():
        key = next((key for key in shapes if key.endswith(ending) and not key.startswith("optimizer.")), None)
        if key is not None:
            sizes[name] = shapes[key][axis]
    return sizes


def check_tensor_shapes(state: dict[str, Any], location: Location, flag: str) -> None:
    """Raise CheckpointError where the torch_dist checkpoint lacks a tensor of `state` or has another shape of it."""
    saved = _tensor_metadata(location)
    problems = []
    for value in state.values():
        if not isinstance(value, ShardedTensor):
            continue
        if value.key not in saved:
            problems.append(f"{value.key} is missing")
        elif tuple(saved[value.key].global_shape) != tuple(value.global_shape) and not value.allow_shape_mismatch:
            there, expected = list(saved[value.key].global_shape), list(value.global_shape)
            problems.append(f"{value.key} is {there} there and {expected} in the student")
    if problems:
        raise CheckpointError(
            f"{flag} {location.directory} is of another architecture: {'; '.join(problems[:3])} ({len(problems)} differences)"
        )


def check_hf_config(bridge: ModelBridge, location: Location, flag: str, *, any_vocabulary: bool) -> None:
    """Raise CheckpointError where the config.json at `location` is of another architecture than the student's."""
    there = _hf_config(location)
    expected = bridge.hf_config.to_dict()
    problems = [
        f"{key} is {there[key]} there and {expected[key]} in the student"
        for key in ARCHITECTURE_KEYS
        if None not in (there.get(key), expected.get(key)) and there[key] != expected[key]
        if not (any_vocabulary and key == "vocab_size")
    ]
    if problems:
        raise CheckpointError(f"{flag} {location.directory} is of another architecture: {'; '.join(problems)}")


def _hf_config(location: Location) -> dict[str, Any]:
    try:
        return read_hf_config(str(location.directory))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _tensor_metadata(location: Location) -> dict[str, Any]:
    """Every tensor of a torch_dist checkpoint, without its values.

    Raises CheckpointError where `.metadata` is not to be trusted.
    """
    safe_metadata.check_metadata(location.directory)
    try:
        return dist_checkpointing.load_tensors_metadata(str(location.directory))
    except CheckpointingException as error:
        raise CheckpointError(f"{location.directory} {reason(error)}") from error
