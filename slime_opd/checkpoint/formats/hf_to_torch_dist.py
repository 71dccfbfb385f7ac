"""Converts a Hugging Face directory to a torch_dist checkpoint, tensor by tensor on the CPU, and verifies it."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from slime_opd.checkpoint.formats import torch_dist
from slime_opd.checkpoint.formats.hf_reader import WeightReader
from slime_opd.checkpoint.formats.state import model_state
from slime_opd.checkpoint.formats.tensors import checksum
from slime_opd.checkpoint.formats.torch_dist import Piece
from slime_opd.checkpoint.formats.untrained import check_all_used
from slime_opd.checkpoint.formats.verification import gather
from slime_opd.config import Config
from slime_opd.errors import CheckpointError
from slime_opd.model.bridge import make_bridge
from slime_opd.model.builder import build_model
from slime_opd.model.vocabulary import padded_vocabulary
from slime_opd.observe.progress import Progress

# A run with any layout cuts the unsplit tensors as it needs them.
_NOT_SPLIT: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
}


@dataclass(frozen=True)
class _Source:
    """The origin of a piece's values: part `index` of the parameter `name`."""

    name: str
    index: int


def convert(config: Config, directory: Path) -> None:
    """Write the weights of --hf-checkpoint to the empty `directory`; the ranks of the process group share the work.

    At most one file's tensors are in memory. Raises CheckpointError where --hf-checkpoint lacks a weight, has one that
    would be lost, or the result differs from what was written.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    unsplit = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **_NOT_SPLIT))
    bridge = make_bridge(unsplit)
    # The padding is that of the run's own tensor parallelism.
    bridge.padded_vocab_size = padded_vocabulary(bridge.vocab_size, config)
    origin = bridge.directory
    reader = WeightReader(origin)
    state = model_state(build_model(unsplit, bridge, on_meta=True))
    hf_names = {name: bridge.hf_names(name) for name in state}
    check_all_used(reader, {one for names in hf_names.values() for one in names}, origin, bridge.hf_config)

    sources: dict[Piece, _Source] = {}
    for name, entry in state.items():
        for index, part in enumerate(_parts(entry, entry.data)):
            sources[_piece(part)] = _Source(name, index)

    # The parts of a parameter come one after the other.
    @functools.lru_cache(maxsize=1)
    def read_parameter(name: str) -> Tensor:
        values = bridge.to_megatron(name, [reader.read(hf_name) for hf_name in hf_names[name]])
        expected = list(state[name].data.shape)
        if list(values.shape) != expected:
            raise CheckpointError(
                f"--hf-checkpoint {origin}: {' and '.join(hf_names[name])} make {list(values.shape)}, expected {expected} for {name}"
            )
        return values

    checksums: dict[Piece, int] = {}
    with Progress("writing", len(sources) // world_size, unit="tensors") as progress:

        def make(piece: Piece) -> Tensor:
            source = sources[piece]
            parts = _parts(state[source.name], read_parameter(source.name))
            part = parts[source.index].data.reshape(piece.shape).to(piece.dtype).contiguous()
            checksums[piece] = checksum(part)
            progress.advance(1)
            return part

        written = torch_dist.write(directory, sources, make, rank=rank, world_size=world_size, gather=_gather_lists)
    dist.barrier()
    _verify(directory, written, checksums)
    dist.barrier()


def _parts(entry: ShardedTensor | ShardedTensorFactory, values: Tensor) -> list[ShardedTensor]:
    """The stored form of a parameter with these values: itself, or the parts that its factory makes of it."""
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


def _gather_lists(own: list) -> list:
    return [result for results in gather(own) for result in results]


def _verify(directory: Path, written: list[Piece], checksums: dict[Piece, int]) -> None:
    reader = torch_dist.Reader(directory)
    tensors = reader.tensors()
    with Progress("reading back", len(written), unit="tensors") as progress:
        for piece in written:
            if tensors.get(piece.key) != (piece.whole, piece.dtype):
                raise CheckpointError(
                    f"{directory}: {piece.key} is {tensors.get(piece.key)} there, {(piece.whole, piece.dtype)} was written"
                )
            if checksum(reader.read(piece.key, piece.offset, piece.shape)) != checksums[piece]:
                raise CheckpointError(
                    f"{directory}: {piece.key} at {piece.offset} is not what was written; is the disk sound?"
                )
            progress.advance(1)
