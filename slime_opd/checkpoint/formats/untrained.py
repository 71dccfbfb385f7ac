"""Weights of a Hugging Face directory that the trained model lacks: ignored, copied to an export, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from transformers import PretrainedConfig

from slime_opd.checkpoint.formats.hf_reader import SCALES, WeightReader
from slime_opd.checkpoint.formats.hf_writer import WeightGroup
from slime_opd.errors import CheckpointError


def check_all_used(reader: WeightReader, used: set[str], directory: str, hf_config: PretrainedConfig) -> None:
    """Raise CheckpointError where --hf-checkpoint lacks one of the `used` weights, or has one that would be lost."""
    if missing := sorted(used - reader.names):
        raise CheckpointError(
            f"--hf-checkpoint {directory} lacks {len(missing)} of the weights that its config.json describes, first {missing[0]}"
        )
    if lost := sorted(name for name in reader.names - used if not _may_be_ignored(name, hf_config)):
        raise CheckpointError(
            f"--hf-checkpoint {directory} has {len(lost)} weights that its config.json does not describe, first {lost[0]}: is config.json of these weights?"
        )


def untrained_weights(origin: str, trained: Iterable[WeightGroup], hf_config: PretrainedConfig) -> list[WeightGroup]:
    """The weights of --origin-hf-dir that are not trained here but copied: layers for multi-token prediction.

    None is copied from a quantised directory, because the trained weights are not quantised. Raises CheckpointError
    where `origin` and `trained` are of different models.
    """
    if not any(Path(origin).glob("*.safetensors")):
        return []  # a directory with config and tokenizer alone
    reader = WeightReader(origin)
    shapes = reader.shapes()
    expected = {name: shape for group in trained for name, (shape, _) in group.tensors.items()}
    problems = [
        f"{name} is {list(shapes[name])} there and {list(shape)} in the checkpoint"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    problems += [
        f"the checkpoint lacks {name}"
        for name in shapes
        if name not in expected and not _may_be_ignored(name, hf_config)
    ]
    if problems:
        raise CheckpointError(
            f"--origin-hf-dir {origin} is of another model: {'; '.join(problems[:3])} ({len(problems)} differences)"
        )
    if getattr(hf_config, "quantization_config", None):
        return []
    return [_copy_of(reader, name) for name in shapes if _is_multi_token_prediction(name, hf_config)]


def _copy_of(reader: WeightReader, name: str) -> WeightGroup:
    weight = reader.read(name)
    return WeightGroup({name: (tuple(weight.shape), weight.dtype)}, lambda: {name: reader.read(name)})


def _is_multi_token_prediction(name: str, hf_config: PretrainedConfig) -> bool:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return ".mtp" in name or (layer is not None and int(layer[1]) >= hf_config.num_hidden_layers)


def _may_be_ignored(name: str, hf_config: PretrainedConfig) -> bool:
    is_tied_output = name == "lm_head.weight" and hf_config.tie_word_embeddings
    is_derived = name.endswith((SCALES, "rotary_emb.inv_freq"))
    return is_tied_output or is_derived or _is_multi_token_prediction(name, hf_config)
