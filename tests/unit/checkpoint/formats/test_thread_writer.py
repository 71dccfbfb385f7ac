"""A rank writes its files of a checkpoint with its own threads, without another process that could be killed."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from slime_opd.checkpoint.formats.thread_writer import write_with_threads


@pytest.fixture
def write(monkeypatch):
    """Megatron's function that writes buckets and puts the results into a queue; it must not start a process."""
    writer = filesystem_async.FileSystemWriterAsync
    monkeypatch.setattr(writer, "write_preloaded_data_multiproc", writer.__dict__["write_preloaded_data_multiproc"])
    monkeypatch.setattr(filesystem_async, "_results_queue", None)

    def no_process(*_: object) -> None:
        raise AssertionError("a process was to be started")

    write_with_threads()
    monkeypatch.setattr(filesystem_async.mp, "get_context", no_process)
    return lambda *arguments: writer.write_preloaded_data_multiproc(*arguments)


def bucket(path: Path, tensor: torch.Tensor) -> tuple:
    item = WriteItem(
        index=MetadataIndex(path.name),
        type=WriteItemType.TENSOR,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size([0]), tensor.shape),
            properties=TensorProperties.create_from_tensor(tensor),
            size=tensor.shape,
        ),
    )
    return path, path.name, ([], [(item, tensor)])


def test_all_files_are_written_and_their_results_returned_by_index(write, tmp_path):
    tensors = [torch.arange(5.0), torch.arange(7.0)]
    results: queue.SimpleQueue = queue.SimpleQueue()
    buckets = [bucket(tmp_path / f"{i}.distcp", tensor) for i, tensor in enumerate(tensors)]
    write([_StorageWriterTransforms()], False, 0, buckets, results)
    outcome = results.get_nowait()
    assert [[result.index.fqn for result in outcome[i]] for i in (0, 1)] == [["0.distcp"], ["1.distcp"]]
    for i, tensor in enumerate(tensors):
        assert torch.equal(torch.load(tmp_path / f"{i}.distcp"), tensor)


def test_the_error_of_a_file_that_cannot_be_written_is_returned(write, tmp_path):
    results: queue.SimpleQueue = queue.SimpleQueue()
    buckets = [bucket(tmp_path / "0.distcp", torch.ones(2)), bucket(tmp_path / "nowhere/1.distcp", torch.ones(2))]
    write([_StorageWriterTransforms()], False, 0, buckets, results)
    assert isinstance(results.get_nowait(), FileNotFoundError)
