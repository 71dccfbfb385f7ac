"""A directory of checkpoints: `iter_0000010/` (or `release/`) and `latest_checkpointed_iteration.txt`, as Megatron-LM writes them.

A step is written under a name that no reader looks at, then renamed, and only then named in the tracker file; so a kill at
any moment leaves the previous checkpoint valid.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_opd.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
RUN_STATE = "run_state.json"


@dataclass(frozen=True)
class Location:
    """One checkpoint on disk. `iteration` is None for a release or a Hugging Face directory."""

    directory: Path
    iteration: int | None
    is_hugging_face: bool = False


def find(path: str, step: int | None = None) -> Location | None:
    """The checkpoint that `path` means, or None where there is none yet.

    `path` may be a directory with a tracker file, one iteration's directory, or a Hugging Face directory. Raises
    CheckpointError when a step is asked for that is not there, or the tracker names one that is not there.
    """
    root = Path(path)
    if (root / ".metadata").is_file():
        return Location(root, _iteration_of(root.name))
    if step is not None:
        return _existing(root, step)
    if (root / TRACKER).is_file():
        named = (root / TRACKER).read_text().strip()
        if named == "release":
            return Location(root / "release", None)
        if not named.isdigit():
            raise CheckpointError(f"{root / TRACKER} holds {named!r}, expected a step number or 'release'")
        return _existing(root, int(named))
    if (root / "config.json").is_file():
        return Location(root, None, is_hugging_face=True)
    return None


def require(path: str, flag: str, step: int | None = None) -> Location:
    """`find`, where a missing checkpoint is an error that names the flag."""
    location = find(path, step)
    if location is None:
        raise CheckpointError(
            f"{flag} {path}: no checkpoint there; expected a {TRACKER}, an iter_… directory or a Hugging Face directory"
        )
    return location


def read_run_state(location: Location) -> dict[str, Any]:
    """The driver's state saved beside the weights: step and data cursor; empty where there is none."""
    path = location.directory / RUN_STATE
    return json.loads(path.read_text()) if path.is_file() else {}


def publish(partial: Path) -> Path:
    """Give a complete `NAME.partial` its name, and name it in the tracker file."""
    root, final = partial.parent, partial.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    tracker = root / f"{TRACKER}.partial"
    iteration = _iteration_of(final.name)
    tracker.write_text("release" if iteration is None else str(iteration))
    tracker.rename(root / TRACKER)
    return final


def remove_old(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; 0 keeps all."""
    complete = sorted(path for path in root.glob("iter_*") if (path / ".metadata").is_file())
    for path in complete[:-keep] if keep else []:
        shutil.rmtree(path)


def _iteration_of(name: str) -> int | None:
    digits = name.removeprefix("iter_")
    return int(digits) if digits.isdigit() else None


def _existing(root: Path, step: int) -> Location:
    directory = root / f"iter_{step:07d}"
    if not (directory / ".metadata").is_file():
        found = sorted(path.name for path in root.glob("iter_*") if (path / ".metadata").is_file())
        raise CheckpointError(f"{directory}: no complete checkpoint there; found {', '.join(found) or 'none'}")
    return Location(directory, step)
