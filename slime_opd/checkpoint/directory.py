"""Finds a checkpoint in a directory with Megatron-LM's names: `iter_0000010/`, `release/`, the tracker file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slime_opd.checkpoint.location import (
    RUN_STATE,
    TOKENIZER,
    Location,
    iteration_of,
    iterations,
)
from slime_opd.checkpoint.lock import LOCK
from slime_opd.checkpoint.whole import alternative, flags_for, newest_whole, read_json, refusal, require_whole
from slime_opd.config import Config
from slime_opd.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
# Files of a run before its first checkpoint is complete. A directory with none of them is not a run's.
_TRACES = ("run", "logs", "config.yaml", "metrics.jsonl", "*.log", "*.partial", "aside_*")


def find(path: str, step: int | None = None, *, flag: str = "--load") -> Location | None:
    """The checkpoint that `path` denotes; None if it is missing, empty, or a run's that has not saved yet.

    `path` may be a directory with a tracker file, one iteration's directory, or a Hugging Face directory; `flag` is the
    option that errors name. Raises CheckpointError where `path` is a file or an unrelated directory, the step does not
    exist, or the tracker file is missing beside checkpoints or names a missing one.
    """
    root = Path(path)
    try:
        is_there = root.exists()
    except OSError as error:  # a name that is too long
        raise CheckpointError(f"{flag} {root} cannot be read: {error.strerror}") from None
    if is_there and not root.is_dir():
        raise CheckpointError(f"{flag} {root} is a file, expected a directory of checkpoints")
    is_one = iteration_of(root.name) is not None or any(root.glob("*.distcp"))
    if (root / ".metadata").is_file() or (is_one and root.is_dir() and not (root / TRACKER).exists()):
        location = Location(root, iteration_of(root.name))
        if step not in (None, location.iteration):
            raise CheckpointError(
                f"{flag} {root} is one checkpoint, but step {step} is another: give {flag} {root.parent}"
            )
        return _complete(location, flag)
    if step is not None:
        return _existing(root, step, flag)
    if (root / TRACKER).exists():
        tracked = read_tracker(root, flag)
        return _complete(Location(root / "release", None), flag) if tracked is None else _existing(root, tracked, flag)
    if (root / "config.json").is_file():
        return Location(root, None, is_hugging_face=True)
    if iterations(root):
        newest = newest_whole(root)
        choice = "none of them is whole" if newest is None else f"the newest whole one is step {newest.iteration}"
        way = "give another directory to start anew"
        if newest is not None:
            way = f"give {flags_for(newest, flag)} or write {newest.iteration} into that file, or {way}"
        raise CheckpointError(
            f"{flag} {root} holds checkpoints but no {TRACKER}, which names the one to load; {choice}: {way}"
        )
    # The lock is no trace: a run takes it before it comes here.
    others = [path for path in root.iterdir() if path.name != LOCK] if root.is_dir() else []
    if others and not any(True for name in _TRACES for _ in root.glob(name)):
        raise CheckpointError(
            f"{flag} {root} is not empty, but holds no checkpoint and no other file of a run; give a directory of checkpoints, or a new one to start in"
        )
    return None


def require(path: str, flag: str, step: int | None = None) -> Location:
    """`find`, but raises CheckpointError where there is no checkpoint."""
    location = find(path, step, flag=flag)
    if location is None:
        raise CheckpointError(
            f"{flag} {path}: no checkpoint there; expected a {TRACKER}, an iter_… directory or a Hugging Face directory"
        )
    return location


def problems(config: Config) -> list[str]:
    """Problems of the checkpoints that a run would load, as far as a quick check shows; one sentence each."""
    options, opd = config.checkpoint, config.opd
    paths = [
        ("--load", options.load, options.ckpt_step),
        ("--ref-load", options.ref_load, options.ref_ckpt_step),
        ("--opd-teacher-load", opd.opd_teacher_load, opd.opd_teacher_ckpt_step),
        ("--hf-checkpoint", config.model.hf_checkpoint, None),
    ]
    sentences = []
    for flag, path, step in paths:
        if path is None:
            continue
        try:
            location = find(path, step, flag=flag)
            if location is not None:
                require_whole(location, flag, verify=not options.no_verify_checkpoint)
                if flag == "--load" and not options.finetune:
                    read_run_state(location)
        except CheckpointError as error:
            sentences.append(str(error))
    return sentences


def read_tracker(root: Path, flag: str = "--load") -> int | None:
    """The step that the tracker file of `root` names; None for a release.

    Raises CheckpointError where it names neither.
    """
    try:
        named = (root / TRACKER).read_bytes()[:64].decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        named = f"no text ({type(error).__name__})"
    if named == "release":
        return None
    if not (named.isdigit() and len(named) < 10):
        newest = newest_whole(root)
        way = (
            ""
            if newest is None
            else f"; the newest whole checkpoint is step {newest.iteration}: give {flags_for(newest, flag)}"
        )
        raise CheckpointError(f"{flag} {root / TRACKER} holds {named!r}, expected a step number or 'release'{way}")
    return int(named)


def read_run_state(location: Location) -> dict[str, Any]:
    """The driver's state saved beside the weights: step and data cursor; {} for a release, which has none.

    Raises CheckpointError where a run's checkpoint has none, or a damaged one: its step and data order are unknown.
    """
    if location.iteration is None:
        return {}
    if not (location.directory / RUN_STATE).is_file():
        raise CheckpointError(
            f"{location.directory}: {RUN_STATE} is missing, which has the step and the data order to resume from: add --finetune to start at step 0 with its weights; {alternative(location, '--load')}"
        )
    try:
        state = read_json(location.directory / RUN_STATE)
    except CheckpointError as error:
        raise CheckpointError(refusal(location, "--load", [str(error)])) from None
    return {key: value for key, value in state.items() if key != "manifest"}


def tokenizer_dir(location: Location) -> Path | None:
    """Directory of the tokenizer of a checkpoint's model; None where it has none."""
    if location.is_hugging_face:
        return location.directory
    directory = location.directory / TOKENIZER
    return directory if directory.is_dir() else None


def _existing(root: Path, step: int, flag: str) -> Location:
    locations = iterations(root)
    location = locations.get(step)
    if location is None:
        others = ", ".join(map(str, locations)) or "none"
        newest = newest_whole(root)
        way = (
            ""
            if newest is None
            else f"; the newest whole one is step {newest.iteration}: give {flags_for(newest, flag)}"
        )
        raise CheckpointError(f"{flag} {root}: step {step} does not exist; existing steps: {others}{way}")
    return _complete(location, flag)


def _complete(location: Location, flag: str) -> Location:
    if not location.directory.is_dir():
        raise CheckpointError(f"{flag} {location.directory}: the directory that {TRACKER} names is not there")
    if not (location.directory / ".metadata").is_file():
        old = any(location.directory.glob("mp_rank_*"))
        reason = "it is in Megatron-LM's older format 'torch', expected 'torch_dist'" if old else ".metadata is missing"
        raise CheckpointError(refusal(location, flag, [reason]))
    return location
