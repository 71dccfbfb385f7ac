"""Reading every file of a checkpoint before any of it is loaded: all ranks together, each its share of the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from slime_opd.checkpoint import manifest
from slime_opd.checkpoint.location import Location
from slime_opd.checkpoint.whole import expected_files, problems_of, refusal
from slime_opd.errors import CheckpointError

T = TypeVar("T")


class Verification:
    """Checks each checkpoint of a start once. `warnings` are of those that could not be verified."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._done: set[Path] = set()
        self.warnings: list[str] = []

    def require(self, location: Location, flag: str) -> None:
        """Raise CheckpointError on every rank where any rank finds a file missing, damaged or not allowed."""
        if location.directory in self._done:
            return
        everyones = gather(self._problems(location))
        if problems := [problem for problems in everyones for problem in problems]:
            raise CheckpointError(refusal(location, flag, list(dict.fromkeys(problems))))
        self._done.add(location.directory)
        if not self._enabled:
            self.warnings.append(f"{flag} {location.directory}: not verified, because of --no-verify-checkpoint")
        elif not location.is_hugging_face and not (location.directory / manifest.MANIFEST).is_file():
            self.warnings.append(
                f"{flag} {location.directory} has no {manifest.MANIFEST}, so that its contents could not be verified"
            )

    def _problems(self, location: Location) -> list[str]:
        problems = problems_of(location, verify=self._enabled) if dist.get_rank() == 0 else []
        if problems or not self._enabled:
            return problems
        try:
            entries = expected_files(location) or []
        except CheckpointError as error:
            return [str(error)]
        sizes = [_size(location.directory / entry.name) for entry in entries]
        names = manifest.share_of([entry.name for entry in entries], sizes, dist.get_rank(), dist.get_world_size())
        return manifest.content_problems(location.directory, [entry for entry in entries if entry.name in set(names)])


def write_manifest(directory: Path) -> None:
    """Write the manifest of a directory that all ranks see; each reads its share of the files."""
    listed = on_first_rank(lambda: [(name, _size(directory / name)) for name in manifest.listed_files(directory)])
    own = manifest.share_of(*zip(*listed, strict=True), dist.get_rank(), dist.get_world_size())
    entries = [entry for share in run_together(lambda: manifest.measure(directory, own)) for entry in share]
    on_first_rank(lambda: manifest.write(directory, entries))


def gather(value: T) -> list[T]:
    """The value of every rank, in rank order."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_together(action: Callable[[], T]) -> list[T]:
    """Run an action on every rank; returns every rank's result.

    Raises on every rank the OSError or CheckpointError that one of them raises, so that none waits for one that has stopped.
    """
    try:
        result, failure = action(), None
    except (OSError, CheckpointError) as error:
        result, failure = None, error
    everyones = gather((result, failure))
    for _, failed in everyones:
        if failed is not None:
            raise failed from failure
    return [result for result, _ in everyones]


def on_first_rank(action: Callable[[], T]) -> T:
    """Run an action on rank 0 and raise on every rank what it raises there; returns its result on every rank."""
    return run_together(lambda: action() if dist.get_rank() == 0 else None)[0]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
