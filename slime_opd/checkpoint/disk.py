"""Free disk space for a checkpoint, and the error message for one that could not be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from slime_opd.checkpoint.directory import TRACKER
from slime_opd.errors import CheckpointError

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: int) -> str:
    """`1536` as `1.5 KiB`."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} bytes" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def check_free_space(root: Path, name: str, needed: int) -> None:
    """Raise CheckpointError where fewer than `needed` bytes are free for the checkpoint `name` in `root`."""
    if shutil.disk_usage(root).free < needed:
        raise CheckpointError(not_written(root, name, needed, "the disk has too little free space"))


def not_written(root: Path, name: str, needed: int, reason: str) -> str:
    """The error message for a checkpoint that could not be written, with bytes needed and free."""
    try:
        free = format_bytes(shutil.disk_usage(root).free)
    except OSError:
        free = "an unknown number of bytes"
    tracker = root / TRACKER
    named = tracker.read_text(errors="replace").strip() if tracker.is_file() else None
    if named is None:
        left = "no checkpoint was complete yet; once this is mended, the same command starts again"
    else:
        last = root / (named if named == "release" else f"iter_{named:0>7}")
        left = f"{last} is intact, and once this is mended the same command continues from it"
    return f"--save {root / name} was not written: {reason} (it needs about {format_bytes(needed)}, {free} are free); {left}"
