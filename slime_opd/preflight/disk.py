"""Directories that a run writes to: whether it can, and whether a checkpoint fits."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from slime_opd.checkpoint.saves import NEWEST_BY_TIME, save_policy
from slime_opd.config import Config
from slime_opd.preflight.findings import Findings
from slime_opd.preflight.memory_estimate import Size, bytes_text


def inspect_written_directories(config: Config, found: Findings) -> None:
    """--save and --run-dir can be written to. Leaves nothing behind."""
    directories = {
        "--save": config.checkpoint.save,
        "--run-dir": config.observe.run_dir,
        "--update-weight-disk-dir": config.weights.update_weight_disk_dir,
    }
    if (recorded := config.debug.save_debug_rollout_data) is not None:
        directories["--save-debug-rollout-data"] = os.path.dirname(recorded) or "."
    if config.checkpoint.save is None and config.observe.run_dir is None:
        directories["--run-dir"] = "runs"
    for flag, directory in directories.items():
        if directory is not None and (reason := why_not_writable(directory)):
            found.problems.append(f"{flag} {directory} is not writable: {reason}")


def why_not_writable(directory: str) -> str | None:
    """Why no file can be written to a directory that exists or will be made; None where one can."""
    parent = _nearest_existing(directory)
    if parent is None:
        return "it is no path that a directory can have"
    if not parent.is_dir():
        return f"{parent} is a file" if parent.is_file() else f"{parent} is not a directory"
    try:
        with tempfile.TemporaryFile(dir=parent, prefix=".slime_opd-check-"):
            # A directory of the kernel's has files, and none can be made.
            probe = tempfile.mkdtemp(dir=parent, prefix=".slime_opd-check-")
            os.rmdir(probe)
    except OSError as error:
        return f"no file can be made in {parent} ({error.strerror or error})"
    return None


def inspect_disk(config: Config, size: Size, found: Findings) -> None:
    """Free space for the checkpoints of a run."""
    save, options = config.checkpoint.save, config.checkpoint
    if save is None or why_not_writable(save):
        return
    one = size.total * ((4 if config.training.fp32 else 2) + (0 if options.no_save_optim else 12))
    policy = save_policy(config)
    by_time = NEWEST_BY_TIME if policy.minutes else 0
    count = options.keep_checkpoints or max(1, by_time, policy.total // policy.rollouts if policy.rollouts else 0)
    free = shutil.disk_usage(_nearest_existing(save) or save).free
    summary = (
        f"--save {save}: {bytes_text(free)} free, a checkpoint takes about {bytes_text(one)} and the run keeps {count}"
    )
    if free < one:
        found.problems.append(f"{summary}: there is no space for one")
    elif free < one * count:
        found.problems.append(f"{summary}: lower the number with --keep-checkpoints, or free some space")
    else:
        found.ok.append(summary)


def _nearest_existing(directory: str) -> Path | None:
    """The directory, or the nearest parent of it that exists; None for what is no path."""
    if "\0" in directory:
        return None
    try:
        path = Path(directory).absolute()
        return next((one for one in (path, *path.parents) if one.exists() or one.is_symlink()), None)
    except OSError:  # a name that is too long
        return None
