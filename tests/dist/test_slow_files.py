"""Files that take longer than --distributed-timeout-minutes do not end a run; a stuck collective still does."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from rollouts import train
from test_objective_layouts import make_config, make_samples

pytestmark = pytest.mark.dist

LIMIT_S = 1.0


def wait_past_the_limit() -> None:
    end = time.monotonic() + 2.5 * LIMIT_S
    while time.monotonic() < end:
        time.sleep(0.05)


def default_limit():
    """The time limit of collectives of torch's default group."""
    import torch
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout


def save_slowly(rank, world_size, init_method, models, directory: str):
    """What a save gives whose second rank takes 2.5 times the limit for a file, and what a collective does that is as late."""
    import torch.distributed as dist

    from slime_opd.model import parallel
    from slime_opd.trainer.trainer import Trainer

    class Watched(Trainer):
        def _load(self):
            self.limit_while_loading = default_limit()
            return super()._load()

    config = make_config(*models, world_size, 1, 1)
    options = dataclasses.replace(config.checkpoint, save=directory)
    trainer = Watched(
        dataclasses.replace(config, checkpoint=options), rank=rank, world_size=world_size, init_method=init_method
    )
    limits = [trainer.limit_while_loading, default_limit()]
    train(trainer, make_samples())
    short = dataclasses.replace(config.training, distributed_timeout_minutes=LIMIT_S / 60)
    trainer.config = dataclasses.replace(trainer.config, training=short)
    dist.barrier()
    parallel._set_timeout(datetime.timedelta(seconds=LIMIT_S))
    sync = os.fsync

    def slow_sync(descriptor: int) -> None:
        wait_past_the_limit()
        sync(descriptor)

    if rank == 1:
        os.fsync = slow_sync
    saved = trainer.save(1, {"step": 1})
    os.fsync = sync
    limits.append(default_limit())
    if rank == 1:
        wait_past_the_limit()
    try:
        dist.barrier()
        late = "arrived"
    except RuntimeError as error:
        late = str(error)
    return str(saved), limits, late


def test_a_rank_that_writes_slowly_is_waited_for_and_one_that_is_stuck_is_not(tiny_model_dir, tmp_path):
    directory = tmp_path / "saved"
    models = (str(tiny_model_dir), str(tiny_model_dir))
    (tmp_path / "rendezvous").mkdir()
    (saved, limits, late), second = run_ranks(save_slowly, 2, tmp_path / "rendezvous", models, str(directory))
    assert Path(saved) == directory / "iter_0000001" == Path(second[0])
    assert (Path(saved) / "manifest.sha256").exists()
    day, ten_minutes = datetime.timedelta(days=1), datetime.timedelta(minutes=10)
    assert limits == [day, ten_minutes, datetime.timedelta(seconds=LIMIT_S)]
    assert "imed out" in late or "imeout" in late
