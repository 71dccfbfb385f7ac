"""The process group of one trainer rank, and where the rank stands in the layout."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import distributed_c10d

from slime_opd.config.stages import ParallelConfig
from slime_opd.model import device

# For collectives that wait for a rank's files. The driver ends a run in which nothing advances much earlier.
FILE_TIMEOUT = datetime.timedelta(days=1)


@dataclass(frozen=True)
class RankLayout:
    """Where one rank stands: its index and the size along each axis."""

    tensor_rank: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes log-probs and losses."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reports(self) -> bool:
        """Whether this rank speaks for its data-parallel group: one rank of the last stage does."""
        return self.is_last_stage and self.tensor_rank == 0


def initialize(
    layout: ParallelConfig, *, rank: int, world_size: int, init_method: str, seed: int, timeout_minutes: float
) -> RankLayout:
    """Join the process group and build Megatron's groups.

    `init_method` is torch.distributed's rendezvous ("tcp://HOST:PORT" or "file://PATH"). Call it once
    per process, before any model is built.
    """
    device.install()
    if device.has_cuda():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        device.backend(),
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
    )
    # Megatron's rule: each pipeline stage draws its own numbers, tensor-parallel ranks share the seed they split.
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
    return RankLayout(
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


@contextmanager
def waiting_for_files(usual_minutes: float) -> Iterator[None]:
    """While inside, collectives wait for a rank that reads or writes files as long as that takes; then `usual_minutes` again.

    Ranks wait there for others whose disk is slower, or have more to write, in groups that Megatron and torch choose. It ends what hangs
    after `--watchdog-timeout-s`. Needs no collective, so that it may be left by way of an exception of one rank.
    """
    _set_timeout(FILE_TIMEOUT)
    try:
        yield
    finally:
        _set_timeout(datetime.timedelta(minutes=usual_minutes))


def _set_timeout(timeout: datetime.timedelta) -> None:
    """Give every group of this rank another time limit, for collectives that begin from now on."""
    # Of Megatron's groups, None is torch's default group. Megatron's own function for this begins with a barrier.
    for group in dict.fromkeys([None, *(parallel_state._global_process_group_list or [])]):
        distributed_c10d._set_pg_timeout(timeout, group)


def shut_down() -> None:
    """Leave the process group; a process may then initialise again (tests do)."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def tool_process(layout: ParallelConfig, seed: int = 1234) -> Iterator[RankLayout]:
    """The process group of a command-line tool: torchrun's where it started this process, else one process alone."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as directory:
        init_method = "env://" if "WORLD_SIZE" in os.environ else f"file://{directory}/rendezvous"
        try:
            here = initialize(
                layout, rank=rank, world_size=world_size, init_method=init_method, seed=seed, timeout_minutes=30
            )
            # What a tool does on several ranks is read and write.
            with waiting_for_files(usual_minutes=30):
                yield here
        finally:
            shut_down()
