"""Gives a complete checkpoint its name, safe against a kill or a power cut, and removes old ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from slime_opd.checkpoint.directory import TRACKER, read_tracker
from slime_opd.checkpoint.location import REPLACED, iteration_of, iterations


def publish(partial: Path) -> Path:
    """Rename a complete `NAME.partial` to `NAME` and name it in the tracker file; returns the new path.

    An older checkpoint of that name is kept as `NAME.replaced` until the new one is named in the tracker file.
    """
    root, final = partial.parent, partial.with_suffix("")
    replaced = final.with_name(final.name + REPLACED)
    synchronize(partial)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    tracker = root / f"{TRACKER}.partial"
    iteration = iteration_of(final.name)
    tracker.write_text("release" if iteration is None else str(iteration))
    _synchronize_one(root)
    _synchronize_one(tracker)
    tracker.rename(root / TRACKER)
    _synchronize_one(root)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def remove_old(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` of the checkpoints up to the one that the tracker file names; 0 keeps all.

    Later steps are left: they belong to a run that was resumed from an earlier step.
    """
    tracked = read_tracker(root, "--save") if (root / TRACKER).exists() else None
    if not keep or tracked is None:
        return
    steps = {step: location for step, location in iterations(root).items() if step <= tracked}
    for step in list(steps)[:-keep]:
        shutil.rmtree(steps[step].directory)


def synchronize(directory: Path) -> None:
    """Wait until every file of a directory, and the names of the files, are on the disk."""
    for path in [*(path for path in directory.rglob("*") if path.is_file()), *directory.glob("*/"), directory]:
        _synchronize_one(path)


def _synchronize_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
