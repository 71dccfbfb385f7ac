"""Writes a rank's files of a checkpoint in the rank's own process.

Megatron-core forks a process per file and waits until each has counted itself done. One that is killed (by the
out-of-memory killer, say) never does, so its rank waits for ever; and a process with threads is not safely forked. They are for saves
that go on in the background. A save that is waited for is written as well by threads: a file's bytes are written without
the interpreter's lock.
"""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

_FileSystemWriter = filesystem_async.FileSystemWriterAsync


def write_with_threads() -> None:
    """Make Megatron's saves write with threads of this process, and pass the results through a queue of it.

    By default that queue is one more process, started by `spawn`: seconds of imports, 300 MB, and it outlives a killed rank.
    """
    _FileSystemWriter.write_preloaded_data_multiproc = staticmethod(_write_files)
    filesystem_async._results_queue = queue.SimpleQueue()


def _write_files(transforms: list[Any], use_msc: bool, rank: int, files: list[Any], results_queue: Any) -> None:
    """Write `files`, Megatron's buckets, and put {index: results} into the queue, or the exception of one that failed."""

    def write(index: int) -> Any:
        # The count that each writer lowers; here the end of its thread says as much.
        done, count = queue.SimpleQueue(), queue.Queue()
        count.put(index)
        _FileSystemWriter.write_preloaded_data(
            transforms, index, files[index], done, count, use_fsync=True, use_msc=use_msc
        )
        return done.get()[1]

    with ThreadPoolExecutor(max(1, len(files)), thread_name_prefix="checkpoint-writer") as pool:
        outcomes = dict(enumerate(pool.map(write, range(len(files)))))
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Exception)]
    results_queue.put(failures[0] if failures else outcomes)
