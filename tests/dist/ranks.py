"""Running a function on several real processes that talk over gloo."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

TIMEOUT_S = 240

# A rank is a process of its own that starts with these imported: a fork of a server that has imported them and done
# nothing else. To import them costs more than most of what is tested on ranks.
PRELOADED = ["slime_opd.trainer.trainer", "slime_opd.checkpoint.formats.hf_to_torch_dist", "transformers.models.auto.modeling_auto"]


def run_ranks(function: Callable[..., Any], world_size: int, directory: Path, *arguments: Any) -> list[Any]:
    """`function(rank, world_size, init_method, *arguments)` on every rank; returns the results in rank order.

    An exception on any rank fails the test with that rank's traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results = context.Queue()
    init_method = f"file://{directory}/rendezvous_{len(list(directory.iterdir()))}"
    processes = [
        context.Process(target=_rank, args=(results, function, rank, world_size, init_method, arguments), daemon=False)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    try:
        while len(answers) < world_size:
            rank, failure, value = results.get(timeout=TIMEOUT_S)
            if failure:
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{failure}")
            answers[rank] = pickle.loads(value)
    finally:
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    return [answers[rank] for rank in range(world_size)]


def _rank(results, function, rank, world_size, init_method, arguments) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    try:
        # Plain bytes: a tensor in a queue is shared memory that dies with the process that made it.
        results.put((rank, None, pickle.dumps(function(rank, world_size, init_method, *arguments))))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
