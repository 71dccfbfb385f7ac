"""Between Hugging Face directories and torch_dist checkpoints, a tensor at a time, on the CPU.

Whatever the size of the model, what is in memory is one file's worth of it. What is written is read again and compared.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from mbridge.core.bridge import Bridge
from mbridge.core.parallel_states import ParallelStates
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from transformers import PretrainedConfig

from slime_opd.checkpoint.formats import torch_dist
from slime_opd.checkpoint.formats.hugging_face import Group, Weights, checksum
from slime_opd.checkpoint.formats.model_state import model_state
from slime_opd.checkpoint.formats.torch_dist import Piece
from slime_opd.config import Config
from slime_opd.config.stages import ModelConfig, TrainingConfig
from slime_opd.errors import CheckpointError
from slime_opd.model.builder import build_model, make_bridge, padded_vocabulary
from slime_opd.model.post_norm import POST_NORMS
from slime_opd.observe.progress import Progress

_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class _Source:
    """Where a piece's values come from: the part `number` of those that the parameter `name` is kept in."""

    name: str
    number: int


def to_torch_dist(config: Config, directory: Path) -> None:
    """Write the weights of --hf-checkpoint to `directory`, which is empty; the ranks of the process group share the work.

    Raises CheckpointError where --hf-checkpoint lacks a weight, holds one that would be lost, or the result is not what was written.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Not split: whoever loads the result cuts it as its own layout has it.
    whole = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **_NOT_SPLIT))
    bridge = make_bridge(whole)
    bridge.padded_vocab_size = padded_vocabulary(bridge.vocab_size, config)
    model = build_model(whole, bridge, on_meta=True)
    weights = Weights(config.model.hf_checkpoint, bridge)
    state = model_state(model)
    names = {name: bridge._weight_name_mapping_mcore_to_hf(name) for name in state}
    weights.check_used({one for used in names.values() for one in used}, bridge.hf_config)

    sources: dict[Piece, _Source] = {}
    for name, entry in state.items():
        for number, part in enumerate(_parts(entry, entry.data)):
            sources[_piece(part)] = _Source(name, number)

    # The parts of a parameter come one after the other.
    @functools.lru_cache(maxsize=1)
    def values_of(name: str) -> Tensor:
        values = bridge._weight_to_mcore_format(name, [weights.read(one) for one in names[name]])
        wanted = list(state[name].data.shape)
        if list(values.shape) != wanted:
            raise CheckpointError(
                f"--hf-checkpoint {config.model.hf_checkpoint}: {' and '.join(names[name])} make {list(values.shape)}, expected {wanted} for {name}"
            )
        return values

    checksums: dict[Piece, int] = {}
    with Progress("writing", len(sources) // world_size, unit="tensors") as progress:

        def make(piece: Piece) -> Tensor:
            source = sources[piece]
            parts = _parts(state[source.name], values_of(source.name))
            part = parts[source.number].data.reshape(piece.shape).to(piece.dtype).contiguous()
            checksums[piece] = checksum(part)
            progress.advance(1)
            return part

        written = torch_dist.write(directory, sources, make, rank=rank, world_size=world_size, gather=_gathered)
    dist.barrier()
    _verify(directory, written, checksums)
    dist.barrier()


_NOT_SPLIT = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
}


def _parts(entry: ShardedTensor | ShardedTensorFactory, values: Tensor) -> list[ShardedTensor]:
    """What a parameter with these values is kept as: itself, or the parts that its factory makes of it."""
    if isinstance(entry, ShardedTensor):
        return [dataclasses.replace(entry, data=values)]
    made = entry.build_fn(entry.key, values, entry.replica_id, None)
    return list(made.values()) if isinstance(made, dict) else list(made)


def _piece(part: ShardedTensor) -> Piece:
    return Piece(
        part.key,
        tuple(part.global_offset),
        (1,) * part.prepend_axis_num + tuple(part.local_shape),
        tuple(part.global_shape),
        part.dtype,
    )


def _gathered(own: list) -> list:
    everyones: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    return [result for results in everyones for result in results]


def _verify(directory: Path, written: list[Piece], checksums: dict[Piece, int]) -> None:
    reader = torch_dist.Reader(directory)
    found = reader.tensors()
    with Progress("reading back", len(written), unit="tensors") as progress:
        for piece in written:
            if found.get(piece.key) != (piece.whole, piece.dtype):
                raise CheckpointError(
                    f"{directory}: {piece.key} is {found.get(piece.key)} there, {(piece.whole, piece.dtype)} was written"
                )
            if checksum(reader.read(piece.key, piece.offset, piece.shape)) != checksums[piece]:
                raise CheckpointError(
                    f"{directory}: {piece.key} at {piece.offset} is not what was written; is the disk sound?"
                )
            progress.advance(1)


def to_hugging_face(reader: torch_dist.Reader, origin: str) -> tuple[list[Group], PretrainedConfig]:
    """The weights of a torch_dist checkpoint in Hugging Face's form, in the model's order, each with the way to read it.

    `origin` is a directory with the model's config.json. Needs no process group. Weights that are made of one parameter come
    together, because they are read together.
    """
    found = {key: value for key, value in reader.tensors().items() if key.startswith(_MODEL_KEYS)}
    (rows, _), dtype = found["embedding.word_embeddings.weight"]
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    config = Config(
        model=ModelConfig(hf_checkpoint=origin, megatron_to_hf_mode="bridge"),
        # No layer runs here, so no kernel is chosen for this machine.
        training=TrainingConfig(**{precision: True, "attention_backend": "local"}),
    )
    bridge = make_bridge(config, ParallelStates())
    bridge.padded_vocab_size = rows
    parameters = [one for key, (shape, kept) in found.items() for one in _parameters(key, shape, kept)]
    groups = []
    for parameter in sorted(parameters, key=lambda one: one.place):
        if bridge.hf_config.tie_word_embeddings and parameter.name == "output_layer.weight":
            continue
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        names, tensors = bridge._weight_to_hf_format(parameter.name, empty)
        kinds = {name: (tuple(tensor.shape), parameter.dtype) for name, tensor in zip(names, tensors, strict=True)}
        groups.append(Group(kinds, _reading(reader, bridge, parameter)))
    return groups, bridge.hf_config


@dataclass(frozen=True)
class _Parameter:
    """A parameter of the model, and the part of a checkpoint's tensor that it is."""

    name: str
    key: str
    offset: tuple[int, ...]
    kept_as: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def place(self) -> tuple[int, int]:
        """Where it comes in the model."""
        layer = re.match(r"decoder\.layers\.(\d+)\.", self.name)
        if layer:
            return 1, int(layer[1])
        return {"embedding": 0, "decoder": 2, "output_layer": 3}[self.name.partition(".")[0]], 0


def _parameters(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[_Parameter]:
    """The parameters in a tensor that may hold one for each layer, for each expert, or for both."""
    name = key
    for apart, kept in POST_NORMS.items():
        name = re.sub(rf"(?<=\.){re.escape(kept)}", apart, name)
    of_layers = re.match(r"decoder\.layers\.(?!\d)", name) is not None
    of_experts = ".experts.experts." in name
    name = name.replace(".experts.experts.", ".experts.") + ("{expert}" if of_experts else "")
    name = re.sub(r"^decoder\.layers\.(?!\d)", "decoder.layers.{layer}.", name)
    axes = of_layers + of_experts
    for place in itertools.product(*map(range, shape[:axes])):
        layer, expert = (place[0] if of_layers else None), (place[-1] if of_experts else None)
        yield _Parameter(
            name.format(layer=layer, expert=expert),
            key,
            place + (0,) * (len(shape) - axes),
            (1,) * axes + shape[axes:],
            shape[axes:],
            dtype,
        )


def _reading(reader: torch_dist.Reader, bridge: Bridge, parameter: _Parameter) -> Callable[[], dict[str, Tensor]]:
    def read() -> dict[str, Tensor]:
        values = reader.read(parameter.key, parameter.offset, parameter.kept_as).reshape(parameter.shape)
        names, tensors = bridge._weight_to_hf_format(parameter.name, values)
        return dict(zip(names, tensors, strict=True))

    return read
