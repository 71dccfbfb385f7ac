"""Rules about files: checkpoints, prompts and recordings that options name are there. Nothing is read."""

from __future__ import annotations

import os
from pathlib import Path

from slime_opd.config.config import Config
from slime_opd.config.options import flag
from slime_opd.config.paths import names_each_rollout


def check_checkpoints_exist(config: Config) -> list[str]:
    """Model directories that are not there. --load may be absent: training starts afresh."""
    checkpoint, problems = config.checkpoint, []
    directories = {
        "hf_checkpoint": config.model.hf_checkpoint,
        "ref_load": checkpoint.ref_load,
        "opd_teacher_load": config.opd.opd_teacher_load,
    }
    for name, found in directories.items():
        if found is None:
            continue
        if not os.path.isdir(found):
            problems.append(f"{flag(name)}: found no directory {found}, expected one with a checkpoint")
        elif name == "hf_checkpoint" and not os.path.isfile(os.path.join(found, "config.json")):
            problems.append(f"--hf-checkpoint: found no config.json in {found}, expected a Hugging Face checkpoint")
        elif _is_empty(found):
            problems.append(f"{flag(name)}: found the empty directory {found}, expected one with a checkpoint")
    problems += [
        f"{flag(name)}: found the file {found}, expected a directory"
        for name, found in (("load", checkpoint.load), ("save", checkpoint.save))
        if found is not None and os.path.isfile(found)
    ]
    return problems


def _is_empty(directory: str) -> bool:
    """Whether a directory has no entries; False for one that may not be listed."""
    try:
        with os.scandir(directory) as entries:
            return next(entries, None) is None
    except OSError:
        return False


def check_data_exists(config: Config) -> list[str]:
    """Prompt files that are not there; `FILE@[a:b]` is a slice of FILE."""
    files = [] if config.replays else [("--prompt-data", config.data.prompt_data)]
    if config.evaluates:
        files += [("--eval-prompt-data", file) for file in config.evaluation.eval_prompt_data[1::2]]
    problems = []
    for name, found in files:
        path = None if found is None else Path(_without_slice(found))
        if path is not None and os.path.isdir(path):
            names = sorted(
                file.name for file in path.iterdir() if file.suffix in (".jsonl", ".json", ".parquet", ".csv")
            )
            example = f" in it, such as {', '.join(names[:3])}" if names else ""
            problems.append(f"{name}: found the directory {path}, expected a file{example}")
        elif path is not None and not os.path.isfile(path):
            problems.append(f"{name}: found no file {path}, expected one in JSONL, JSON, CSV or Parquet")
    return problems


def _without_slice(file: str) -> str:
    path, slice_mark, _ = file.rpartition("@[")
    return path if slice_mark and file.endswith("]") else file


def check_recordings_exist(config: Config) -> list[str]:
    """No recording at all. Which are missing depends on where the run starts, and is reported once that is known."""
    path = config.debug.load_debug_rollout_data
    if path is None or not names_each_rollout(path):
        return []
    numbers = range(1, (config.rollout.num_rollout or 0) + 1)
    if not numbers or any(Path(path.format(rollout_id=number)).is_file() for number in numbers):
        return []
    return [f"--load-debug-rollout-data: found no file of {path} for any rollout from 1 to {len(numbers)}"]
