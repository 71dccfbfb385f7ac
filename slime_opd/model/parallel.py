"""Process groups of a trainer rank, and its position in the parallel layout."""

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

# Timeout of collectives that wait for a rank's files. The driver's watchdog ends a hanging run much earlier.
FILE_TIMEOUT = datetime.timedelta(days=1)


@dataclass(frozen=True)
class RankLayout:
    """Position of one rank: its index and the size along each axis of the layout."""

    tensor_rank: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes log-probs and losses."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reports(self) -> bool:
        """Whether this rank returns results for its model replica: one rank of the last stage does."""
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
    # Megatron's rule: each pipeline stage has its own seed; tensor-parallel ranks share one.
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
    return RankLayout(
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
    )


@contextmanager
def waiting_for_files(usual_minutes: float) -> Iterator[None]:
    """Inside, collectives have no practical timeout, so that ranks can wait for others' files.

    Afterwards the timeout is `usual_minutes` again. Ranks with slower disks or more to write let others wait, in groups
    that Megatron and torch choose. A hang is ended by `--watchdog-timeout-s`. Entering and leaving need no collective,
    so one rank may leave with an exception.
    """
    _set_timeout(FILE_TIMEOUT)
    try:
        yield
    finally:
        _set_timeout(datetime.timedelta(minutes=usual_minutes))


def _set_timeout(timeout: datetime.timedelta) -> None:
    """Set the timeout of every process group of this rank, for later collectives."""
    # None is torch's default group. Megatron's own function for this begins with a barrier.
    for group in dict.fromkeys([None, *(parallel_state._global_process_group_list or [])]):
        distributed_c10d._set_pg_timeout(timeout, group)


def shut_down() -> None:
    """Destroy the process groups; the process may initialize again (tests do)."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def tool_process(layout: ParallelConfig, seed: int = 1234) -> Iterator[RankLayout]:
    """Process groups of a command-line tool: torchrun's if it started this process, else of one process."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as directory:
        init_method = "env://" if "WORLD_SIZE" in os.environ else f"file://{directory}/rendezvous"
        try:
            rank_layout = initialize(
                layout, rank=rank, world_size=world_size, init_method=init_method, seed=seed, timeout_minutes=30
            )
            # A tool's ranks only read and write files.
            with waiting_for_files(usual_minutes=30):
                yield rank_layout
        finally:
            shut_down()
