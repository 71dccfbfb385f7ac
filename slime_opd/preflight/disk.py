"""Room for the checkpoints of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from slime_opd.checkpoint.saves import NEWEST_BY_TIME, save_policy
from slime_opd.config import Config
from slime_opd.memory_estimate import GIB, Size
from slime_opd.preflight.findings import Findings


def look_at_disk(config: Config, size: Size, found: Findings) -> None:
    """Room for a checkpoint where they are saved."""
    save, options = config.checkpoint.save, config.checkpoint
    if save is None:
        return
    place = next(path for path in (Path(save).absolute(), *Path(save).absolute().parents) if path.exists())
    one = size.total * ((4 if config.training.fp32 else 2) + (0 if options.no_save_optim else 12))
    policy = save_policy(config)
    by_time = NEWEST_BY_TIME if policy.minutes else 0
    count = options.keep_checkpoints or max(1, by_time, policy.total // policy.rollouts if policy.rollouts else 0)
    free = shutil.disk_usage(place).free
    said = (
        f"--save {save}: {free / GIB:.1f} GiB free, a checkpoint takes about {one / GIB:.1f} and the run keeps {count}"
    )
    if free < one:
        found.problems.append(f"{said}: there is no room for one")
    elif free < one * count:
        found.problems.append(f"{said}: lower the number with --keep-checkpoints, or make room")
    else:
        found.fine.append(said)
