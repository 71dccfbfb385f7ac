"""Reads and writes torch_dist checkpoints piece by piece: without a model, and without the whole checkpoint in memory.

The format is torch.distributed.checkpoint's; Megatron adds `common.pt` and `metadata.json`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    SavePlan,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from slime_opd.checkpoint import safe_metadata
from slime_opd.errors import CheckpointError

# Size of one file. Its pieces stay in memory until it is closed.
_FILE_BYTES = 2**30


@dataclass(frozen=True)
class Piece:
    """A part of the tensor `key`: its offset and shape, the shape of the whole tensor, and the dtype."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the part."""
        return math.prod(self.shape) * self.dtype.itemsize


class Reader:
    """Parts of the tensors of one checkpoint directory.

    Raises CheckpointError where its `.metadata` cannot be trusted.
    """

    def __init__(self, directory: str | Path) -> None:
        safe_metadata.check_metadata(Path(directory))
        self._files = FileSystemReader(directory)
        self._metadata = self._files.read_metadata()
        self._files.set_up_storage_reader(self._metadata, is_coordinator=True)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor, by key."""
        return {
            key: (tuple(stored.size), stored.properties.dtype)
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The part of the tensor `key` of this shape that begins at `offset`."""
        stored = self._metadata.state_dict_metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{key} is no tensor in this checkpoint")
        part = torch.empty(shape, dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        self._files.read_data(LoadPlan(items), _IntoTensor(part)).wait()
        return part


class _IntoTensor(DefaultLoadPlanner):
    """A load planner that reads into one tensor."""

    def __init__(self, part: Tensor) -> None:
        super().__init__()
        self._part = part

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._part
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class _LazyPieces(DefaultSavePlanner):
    """A save planner that makes each piece when it is written."""

    def __init__(self, make: Callable[[Piece], Tensor], pieces: Mapping[MetadataIndex, Piece]) -> None:
        super().__init__()
        self._make, self._pieces = make, pieces

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._make(self._pieces[write_item.index])


def write(
    directory: Path,
    pieces: Iterable[Piece],
    make: Callable[[Piece], Tensor],
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[list[list[WriteResult]]], list[list[WriteResult]]] = lambda own: own,
) -> list[Piece]:
    """Write all pieces; returns those that this rank wrote.

    `make` returns a piece's values; it is called when the piece is written. With several ranks, all are given the same
    pieces and each makes and writes a share of them; `gather` concatenates the ranks' lists on rank 0, which completes
    the checkpoint.
    """
    files = list(_files(pieces))
    plans, metadata = create_default_global_save_plan([SavePlan([_item(p) for p in file]) for file in files])
    writer = FileSystemWriter(directory, thread_count=1, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(is_coordinator=rank == 0)
    plans = writer.prepare_global_plan(plans)
    by_index = {_item(piece).index: piece for file in files for piece in file}
    planner = _LazyPieces(make, by_index)
    results = [writer.write_data(plan, planner).wait() for plan in plans[rank::world_size]]
    all_results = gather(results)
    if rank == 0:
        torch.save({"iteration": 0}, directory / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))
        writer.finish(metadata, all_results)
    return [piece for file in files[rank::world_size] for piece in file]


def _item(piece: Piece) -> WriteItem:
    offset, shape = torch.Size(piece.offset), torch.Size(piece.shape)
    return WriteItem(
        index=MetadataIndex(piece.key, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offset, shape),
            properties=TensorProperties(dtype=piece.dtype),
            size=torch.Size(piece.whole),
        ),
    )


def _files(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    file: list[Piece] = []
    for piece in pieces:
        if file and sum(other.bytes for other in file) + piece.bytes > _FILE_BYTES:
            yield file
            file = []
        file.append(piece)
    if file:
        yield file
