"""The quick check of a checkpoint: is it whole? And the error message for one that is not.

It reads small files and the sizes of large ones, so it takes no longer for a large model. The trainer's ranks read
every file, in `slime_opd/checkpoint/formats/verification.py`.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from slime_opd.checkpoint import manifest, safe_metadata
from slime_opd.checkpoint.location import RUN_STATE, Location, iterations
from slime_opd.errors import CheckpointError

# Files up to this size are compared with their checksum even in the quick check.
_SMALL_BYTES = 2**24
# Flags that choose a step, by the flag of the directory.
_STEP_FLAGS = {
    "--load": "--ckpt-step",
    "--save": "--ckpt-step",
    "--ref-load": "--ref-ckpt-step",
    "--opd-teacher-load": "--opd-teacher-ckpt-step",
}


def problems_of(location: Location, *, verify: bool = True) -> list[str]:
    """Problems of a checkpoint that the quick check finds, one sentence for each file; [] if it finds none.

    Checks the files of its manifest (presence, sizes, checksums up to 16 MiB; not with `verify` False), and that the
    files without which a torch_dist checkpoint cannot be loaded are readable.
    """
    directory = location.directory
    try:
        if not directory.is_dir():
            return ["the directory does not exist"]
        entries = expected_files(location) if verify else None
        if entries is not None:
            small = [entry for entry in entries if entry.size is not None and entry.size <= _SMALL_BYTES]
            problems = manifest.size_problems(directory, entries) or manifest.content_problems(directory, small)
            if problems:
                return problems
        if location.is_hugging_face:
            return []
        return _problems_of_torch_dist(directory, must_have_manifest=verify and entries is None)
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"{error.filename or directory} cannot be read ({error.strerror})"]


def expected_files(location: Location) -> list[manifest.Entry] | None:
    """Entries of a checkpoint's manifest; None where it has none. Raises CheckpointError where it is damaged.

    Without a missing run state: --finetune, which needs none, may still load the weights; `directory.read_run_state`
    reports it.
    """
    entries = manifest.read(location.directory)
    if entries is None or (location.directory / RUN_STATE).is_file():
        return entries
    return [entry for entry in entries if entry.name != RUN_STATE]


def _problems_of_torch_dist(directory: Path, *, must_have_manifest: bool) -> list[str]:
    for name in (".metadata", "metadata.json", "common.pt"):
        if not (directory / name).is_file():
            return [f"{name} is missing"]
    backend = read_json(directory / "metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        return [f"metadata.json: the format is {backend!r}, expected 'torch_dist'"]
    if not zipfile.is_zipfile(directory / "common.pt"):
        return ["common.pt is damaged: expected an archive of torch.save"]
    # The run state records that a checkpoint was written with a manifest.
    has_state = must_have_manifest and (directory / RUN_STATE).is_file()
    if has_state and read_json(directory / RUN_STATE).get("manifest"):
        return [f"{manifest.MANIFEST} is missing, although this checkpoint was written with one"]
    problems = []
    for name, least in sorted(safe_metadata.check_metadata(directory).items()):
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            problems.append(f"{name} is missing")
        elif size < least:
            problems.append(f"{name} is cut off: it has {size:,} bytes, .metadata refers to {least:,}")
    return problems


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint. Raises CheckpointError where it is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is damaged: it is not JSON ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} is damaged: expected a JSON object")
    return content


def refusal(location: Location, flag: str, problems: list[str]) -> str:
    """The error message for a checkpoint that cannot be loaded: which file, its problem, and what to load instead."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{flag} {location.directory}: {problems[0]}{more}; {alternative(location, flag)}"


def alternative(location: Location, flag: str) -> str:
    """The end of an error message about a damaged checkpoint: what to do instead."""
    if location.iteration is None:
        return "copy or convert it again from its source"
    root = location.directory.parent
    other = newest_whole(root, before=location.iteration)
    if other is None:
        return f"no earlier checkpoint in {root} is whole"
    return f"the newest earlier one that looks whole is step {other.iteration}: {flags_for(other, flag)}"


def flags_for(location: Location, flag: str) -> str:
    """The flags that load this checkpoint, in place of the option `flag`."""
    step_flag = _STEP_FLAGS.get(flag)
    if step_flag is None:
        return f"{flag} {location.directory}"
    return f"{flag} {location.directory.parent} {step_flag} {location.iteration}"


def newest_whole(root: Path, before: int | None = None) -> Location | None:
    """The checkpoint of the highest step (below `before`) that passes the quick check; None if none does."""
    for step, location in reversed(iterations(root).items()):
        if (before is None or step < before) and not problems_of(location):
            return location
    return None


def require_whole(location: Location, flag: str, *, verify: bool = True) -> None:
    """Raise CheckpointError where the quick check finds a problem."""
    if problems := problems_of(location, verify=verify):
        raise CheckpointError(refusal(location, flag, problems))
