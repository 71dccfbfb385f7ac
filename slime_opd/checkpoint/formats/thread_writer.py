"""Replaces Megatron-core's writer processes by threads of the rank.

Megatron-core forks a process per file, for saves in the background, and waits until each reports. If one is killed (by
the out-of-memory killer, say) its rank waits forever; and forking a process with threads is not safe. Saves here are
not in the background, and threads write as fast, because writing a file's bytes releases the interpreter's lock.
"""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

_FileSystemWriter = filesystem_async.FileSystemWriterAsync


def write_with_threads() -> None:
    """Make Megatron's saves write with threads of this process, and pass their results through a queue in it.

    Megatron's default queue is another process, started by `spawn`: it costs seconds of imports and 300 MB, and
    outlives a killed rank.
    """
    _FileSystemWriter.write_preloaded_data_multiproc = staticmethod(_write_files)
    filesystem_async._results_queue = queue.SimpleQueue()


def _write_files(transforms: list[Any], use_msc: bool, rank: int, files: list[Any], results_queue: Any) -> None:
    """Write `files`, Megatron's buckets, and put {index: results} into the queue, or an exception if a file failed."""

    def write(index: int) -> Any:
        # Megatron's writer takes an item from `count` when it ends; here the end of its thread shows that already.
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        count: queue.Queue[int] = queue.Queue()
        count.put(index)
        _FileSystemWriter.write_preloaded_data(
            transforms, index, files[index], done, count, use_fsync=True, use_msc=use_msc
        )
        return done.get()[1]

    with ThreadPoolExecutor(max(1, len(files)), thread_name_prefix="checkpoint-writer") as pool:
        outcomes = dict(enumerate(pool.map(write, range(len(files)))))
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Exception)]
    results_queue.put(failures[0] if failures else outcomes)
