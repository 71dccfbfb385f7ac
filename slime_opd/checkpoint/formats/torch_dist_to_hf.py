"""Converts a torch_dist checkpoint to a Hugging Face directory, shard by shard on the CPU."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from slime_opd.checkpoint.formats import hf_writer, torch_dist
from slime_opd.checkpoint.formats.hf_writer import WeightGroup
from slime_opd.checkpoint.formats.untrained import untrained_weights
from slime_opd.config import Config
from slime_opd.config.stages import ModelConfig, TrainingConfig
from slime_opd.model.bridge import ModelBridge, make_bridge
from slime_opd.model.post_norm import POST_NORMS

SHARD_BYTES = 5 * 1024**3

_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
_FLAG_OF_DTYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def convert(
    directory: str | Path, output: str | Path, origin: str, *, shard_bytes: int = SHARD_BYTES, overwrite: bool = False
) -> list[str]:
    """Write the checkpoint in `directory` to `output`, with tokenizer, config and untrained weights of `origin`.

    Reads files only: needs no GPU and no process group. An interrupted conversion is resumed; returns the shards that
    were complete already. Raises CheckpointError as `hf_writer.write` does.
    """
    directory = Path(directory)
    trained, hf_config = trained_weights(torch_dist.Reader(directory), origin)
    return hf_writer.write(
        [*trained, *untrained_weights(origin, trained, hf_config)],
        output,
        origin,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        source=str(directory.resolve()),
    )


def trained_weights(reader: torch_dist.Reader, origin: str) -> tuple[list[WeightGroup], PretrainedConfig]:
    """A checkpoint's weights under Hugging Face's names, in the model's order, and the config of `origin`."""
    tensors = {key: value for key, value in reader.tensors().items() if key.startswith(_MODEL_KEYS)}
    (rows, _), dtype = tensors["embedding.word_embeddings.weight"]
    precision: dict[str, Any] = {_FLAG_OF_DTYPE[dtype]: True}
    config = Config(
        model=ModelConfig(hf_checkpoint=origin, megatron_to_hf_mode="bridge"),
        # No layer runs here, so no kernel is chosen for this machine.
        training=TrainingConfig(attention_backend="local", **precision),
    )
    bridge = make_bridge(config, is_unsplit=True)
    bridge.padded_vocab_size = rows
    parameters = [
        parameter for key, (shape, dtype) in tensors.items() for parameter in _parameters_in(key, shape, dtype)
    ]
    groups = []
    for parameter in sorted(parameters, key=lambda parameter: parameter.order):
        if bridge.is_tied and parameter.name == "output_layer.weight":
            continue
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        weights = dict(bridge.to_hugging_face(parameter.name, empty))
        infos = {name: (tuple(weight.shape), parameter.dtype) for name, weight in weights.items()}
        groups.append(WeightGroup(infos, _read_function(reader, bridge, parameter)))
    return groups, bridge.hf_config


@dataclass(frozen=True)
class _Parameter:
    """A parameter of the model, and its part of a checkpoint's tensor `key`: offset and shape there."""

    name: str
    key: str
    offset: tuple[int, ...]
    stored_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def order(self) -> tuple[int, int]:
        """Sort key of the model's order: embedding, layers, final norm, output layer."""
        layer = re.match(r"decoder\.layers\.(\d+)\.", self.name)
        if layer:
            return 1, int(layer[1])
        return {"embedding": 0, "decoder": 2, "output_layer": 3}[self.name.partition(".")[0]], 0


def _parameters_in(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[_Parameter]:
    """The parameters in a tensor that may hold one for each layer, for each expert, or for both, on leading axes."""
    name = key
    for apart, stored in POST_NORMS.items():
        name = re.sub(rf"(?<=\.){re.escape(stored)}", apart, name)
    per_layer = re.match(r"decoder\.layers\.(?!\d)", name) is not None
    per_expert = ".experts.experts." in name
    name = name.replace(".experts.experts.", ".experts.") + ("{expert}" if per_expert else "")
    name = re.sub(r"^decoder\.layers\.(?!\d)", "decoder.layers.{layer}.", name)
    axes = per_layer + per_expert
    for index in itertools.product(*map(range, shape[:axes])):
        layer, expert = (index[0] if per_layer else None), (index[-1] if per_expert else None)
        yield _Parameter(
            name.format(layer=layer, expert=expert),
            key,
            index + (0,) * (len(shape) - axes),
            (1,) * axes + shape[axes:],
            shape[axes:],
            dtype,
        )


def _read_function(
    reader: torch_dist.Reader, bridge: ModelBridge, parameter: _Parameter
) -> Callable[[], dict[str, Tensor]]:
    def read() -> dict[str, Tensor]:
        values = reader.read(parameter.key, parameter.offset, parameter.stored_shape).reshape(parameter.shape)
        return dict(bridge.to_hugging_face(parameter.name, values))

    return read
