"""Moves checkpoints aside before new ones take their names: by renaming, so that a kill at any moment loses nothing."""

from __future__ import annotations

import datetime
import json
import re
import shutil
from pathlib import Path
from typing import Any

from slime_opd.checkpoint.atomic import replace_text
from slime_opd.checkpoint.directory import TRACKER
from slime_opd.checkpoint.location import REPLACED, iterations

_ASIDE = re.compile(r"aside_(\d+)_[-\d]+(\.partial)?")
# The moves that an interrupted `set_aside` has still to make.
_PLAN = "moving.json"


def complete_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints under `root`, in ascending order."""
    return [step for step, location in iterations(root).items() if (location.directory / ".metadata").is_file()]


def iteration_path(root: Path, step: int) -> Path:
    """The directory of the checkpoint of a step."""
    return root / f"iter_{step:07d}"


def latest_step(root: Path) -> int | None:
    """The step that the tracker file names; None where there is none, or a release."""
    text = (root / TRACKER).read_text().strip() if (root / TRACKER).is_file() else ""
    return int(text) if text.isdigit() else None


def aside_directories(root: Path) -> list[Path]:
    """Directories of checkpoints that were set aside, oldest first; each can be given to --load."""
    return [path for _, path in sorted(_aside_by_number(root).items())]


def _aside_by_number(root: Path) -> dict[int, Path]:
    matches = {path: _ASIDE.fullmatch(path.name) for path in root.glob("aside_*")}
    return {int(match[1]): path for path, match in matches.items() if match and not match[2]}


def set_aside(root: Path, newest: int | None) -> Path | None:
    """Move checkpoints after step `newest` (None: all) to `aside_N_DATE` under `root`; `newest` becomes the latest.

    With None the latest is the release, if there is one, else no checkpoint. Returns the new directory, or None if
    there is nothing to move. The plan is on disk before the first move, so that `finish_set_aside` can complete it
    after a kill. No checkpoint is copied or deleted.
    """
    steps = [step for step in complete_steps(root) if newest is None or step > newest]
    if not steps:
        return None
    number = 1 + max(_aside_by_number(root), default=0)
    partial = root / f"aside_{number}_{datetime.date.today():%Y-%m-%d}.partial"
    partial.mkdir()
    replace_text(partial / _PLAN, json.dumps({"steps": steps, "newest": newest}))
    return finish_set_aside(root)


def finish_set_aside(root: Path) -> Path | None:
    """Complete an interrupted `set_aside`; returns the directory of its checkpoints, or None if there was none."""
    done = None
    for partial in sorted(root.glob("aside_*.partial")):
        if not (partial / _PLAN).is_file():
            # Killed before the plan was written: nothing was moved. Or after it was removed: everything was.
            if not complete_steps(partial):
                shutil.rmtree(partial)
                continue
        else:
            _carry_out(root, partial, json.loads((partial / _PLAN).read_text()))
        done = partial.rename(partial.with_suffix(""))
    return done


def _carry_out(root: Path, partial: Path, plan: dict[str, Any]) -> None:
    latest = "release" if plan["newest"] is None else str(plan["newest"])
    if latest != "release" or (root / latest).is_dir():
        replace_text(root / TRACKER, latest)
    else:
        (root / TRACKER).unlink(missing_ok=True)
    for step in plan["steps"]:
        path = iteration_path(root, step)
        for directory in (path, path.with_name(path.name + REPLACED)):
            if directory.is_dir():
                directory.rename(partial / directory.name)
    replace_text(partial / TRACKER, str(max(plan["steps"])))
    (partial / _PLAN).unlink()
