"""Moving checkpoints aside before others take their names: by renaming, and such that a kill at any moment loses nothing."""

from __future__ import annotations

import datetime
import json
import re
import shutil
from pathlib import Path

from slime_opd.checkpoint.atomic import replace_text
from slime_opd.checkpoint.directory import TRACKER
from slime_opd.checkpoint.location import REPLACED, iterations

_ASIDE = re.compile(r"aside_(\d+)_[-\d]+(\.partial)?")
# What an unfinished `set_aside` still has to move.
_PLAN = "moving.json"


def complete_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints under `root`, in ascending order."""
    return [found.iteration for found in iterations(root) if (found.directory / ".metadata").is_file()]


def iteration_path(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"iter_{step:07d}"


def latest_step(root: Path) -> int | None:
    """The step that the tracker file names; None where there is none, or a release."""
    text = (root / TRACKER).read_text().strip() if (root / TRACKER).is_file() else ""
    return int(text) if text.isdigit() else None


def aside_directories(root: Path) -> list[Path]:
    """Directories of checkpoints that were set aside, oldest first; each can be given to --load."""
    found = {path: match for path in root.glob("aside_*") if (match := _ASIDE.fullmatch(path.name)) and not match[2]}
    return sorted(found, key=lambda path: int(found[path][1]))


def set_aside(root: Path, newest: int | None) -> Path | None:
    """Move the checkpoints of steps after `newest` (None: all) to `aside_N_DATE` under `root`, and make `newest` the latest.

    With None the latest is the release, where there is one, and otherwise no checkpoint. Returns the new directory, or None
    where there is nothing to move. The plan is on disk before the first move, so a kill at any moment leaves either no plan
    or one that `finish_set_aside` completes; no checkpoint is copied or deleted.
    """
    steps = [step for step in complete_steps(root) if newest is None or step > newest]
    if not steps:
        return None
    number = 1 + max((int(_ASIDE.fullmatch(path.name)[1]) for path in aside_directories(root)), default=0)
    partial = root / f"aside_{number}_{datetime.date.today():%Y-%m-%d}.partial"
    partial.mkdir()
    replace_text(partial / _PLAN, json.dumps({"steps": steps, "newest": newest}))
    return finish_set_aside(root)


def finish_set_aside(root: Path) -> Path | None:
    """Complete a `set_aside` that a kill interrupted; returns the directory of the checkpoints, None where there was none."""
    done = None
    for partial in sorted(root.glob("aside_*.partial")):
        if not (partial / _PLAN).is_file():
            # Killed before the plan was written, so nothing was moved; or after it was removed, and all was.
            if not complete_steps(partial):
                shutil.rmtree(partial)
                continue
        else:
            _carry_out(root, partial, json.loads((partial / _PLAN).read_text()))
        done = partial.rename(partial.with_suffix(""))
    return done


def _carry_out(root: Path, partial: Path, plan: dict) -> None:
    latest = "release" if plan["newest"] is None else str(plan["newest"])
    if latest != "release" or (root / latest).is_dir():
        replace_text(root / TRACKER, latest)
    else:
        (root / TRACKER).unlink(missing_ok=True)
    for step in plan["steps"]:
        path = iteration_path(root, step)
        for found in (path, path.with_name(path.name + REPLACED)):
            if found.is_dir():
                found.rename(partial / found.name)
    replace_text(partial / TRACKER, str(max(plan["steps"])))
    (partial / _PLAN).unlink()
