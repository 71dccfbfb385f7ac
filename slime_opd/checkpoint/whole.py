"""Whether a checkpoint is whole, as far as a short look shows, and the sentence for one that is not.

A short look reads small files and the sizes of large ones, and takes no longer for a large model. Reading everything is the work
of the trainer's ranks, `slime_opd/checkpoint/formats/verification.py`.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from slime_opd.checkpoint import manifest, trusted
from slime_opd.checkpoint.location import RUN_STATE, Location, iterations
from slime_opd.errors import CheckpointError

# Files up to this size are compared with their checksum even in a short look.
_SMALL_BYTES = 2**24
# The flag that chooses another step, by the flag that names the directory.
_STEP_FLAGS = {
    "--load": "--ckpt-step",
    "--save": "--ckpt-step",
    "--ref-load": "--ref-ckpt-step",
    "--opd-teacher-load": "--opd-teacher-ckpt-step",
}


def problems_of(location: Location, *, verify: bool = True) -> list[str]:
    """What is wrong with a checkpoint, a sentence for each file; [] where a short look finds nothing.

    Checks what its manifest lists (presence, sizes, checksums of files up to 16 MiB; not with `verify` False), and that the files
    without which a torch_dist checkpoint cannot be loaded can be read.
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
    """What the manifest of a checkpoint lists; None where it has none. Raises CheckpointError where it is damaged.

    A missing run state is left to `directory.read_run_state`: --finetune, which needs none, may still take the weights.
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
        return ["common.pt is damaged: it is no archive of torch.save"]
    # A checkpoint that was written with a manifest says so in its run state.
    has_state = must_have_manifest and (directory / RUN_STATE).is_file()
    if has_state and read_json(directory / RUN_STATE).get("manifest"):
        return [f"{manifest.MANIFEST} is missing, with which this checkpoint was written"]
    problems = []
    for name, least in sorted(trusted.check_metadata(directory).items()):
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            problems.append(f"{name} is missing")
        elif size < least:
            problems.append(f"{name} is cut off: it has {size:,} bytes, .metadata refers to {least:,}")
    return problems


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint. Raises CheckpointError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is damaged: it is not JSON ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} is damaged: expected a JSON object")
    return found


def refusal(location: Location, flag: str, problems: list[str]) -> str:
    """The sentence for a checkpoint that cannot be loaded: which file, what is wrong with it, and what to load instead."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{flag} {location.directory}: {problems[0]}{more}; {alternative(location, flag)}"


def alternative(location: Location, flag: str) -> str:
    """What to do instead of loading a damaged checkpoint."""
    if location.iteration is None:
        return "copy or convert it again from its source"
    root = location.directory.parent
    other = newest_whole(root, before=location.iteration)
    if other is None:
        return f"no earlier checkpoint in {root} is whole"
    return f"the newest earlier one that looks whole is step {other.iteration}: {flags_for(other, flag)}"


def flags_for(location: Location, flag: str) -> str:
    """The flags that load one of several checkpoints, where `flag` names the directory."""
    step_flag = _STEP_FLAGS.get(flag)
    if step_flag is None:
        return f"{flag} {location.directory}"
    return f"{flag} {location.directory.parent} {step_flag} {location.iteration}"


def newest_whole(root: Path, before: int | None = None) -> Location | None:
    """The checkpoint of the highest step (below `before`) in which a short look finds nothing wrong."""
    for location in reversed(iterations(root)):
        if (before is None or location.iteration < before) and not problems_of(location):
            return location
    return None


def require_whole(location: Location, flag: str, *, verify: bool = True) -> None:
    """Raise CheckpointError where a short look finds something wrong with a checkpoint."""
    if problems := problems_of(location, verify=verify):
        raise CheckpointError(refusal(location, flag, problems))
