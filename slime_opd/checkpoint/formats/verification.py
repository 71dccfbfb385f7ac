"""Verifies every file of a checkpoint before any of it is loaded.

All ranks take part, each with its share of the files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist

from slime_opd.checkpoint import manifest
from slime_opd.checkpoint.location import Location
from slime_opd.checkpoint.whole import expected_files, problems_of, refusal
from slime_opd.errors import CheckpointError

T = TypeVar("T")


class Verification:
    """Verifies each checkpoint of a start once. `warnings`: about checkpoints that could not be verified."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._done: set[Path] = set()
        self.warnings: list[str] = []

    def require(self, location: Location, flag: str) -> None:
        """Raise CheckpointError on every rank where any rank finds a file missing, damaged or not allowed."""
        if location.directory in self._done:
            return
        if problems := [problem for problems in gather(self._problems(location)) for problem in problems]:
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
    names, sizes = [name for name, _ in listed], [size for _, size in listed]
    own = manifest.share_of(names, sizes, dist.get_rank(), dist.get_world_size())
    entries = [entry for share in run_together(lambda: manifest.measure(directory, own)) for entry in share]
    on_first_rank(lambda: manifest.write(directory, entries))


def gather(value: T) -> list[T]:
    """The value of every rank, in rank order."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_together(action: Callable[[], T]) -> list[T]:
    """Run an action on every rank; returns the results of all ranks.

    An OSError or CheckpointError of one rank is raised on every rank, so that none waits for a rank that has stopped.
    """
    results: list[T] = []
    failure = None
    try:
        results.append(action())
    except (OSError, CheckpointError) as error:
        failure = error
    outcomes = gather((results, failure))
    for _, failed in outcomes:
        if failed is not None:
            raise failed from failure
    return [result for results, _ in outcomes for result in results]


def on_first_rank(action: Callable[[], T]) -> T:
    """Run an action on rank 0; returns its result, or raises its OSError or CheckpointError, on every rank."""
    result = run_together(lambda: action() if dist.get_rank() == 0 else None)[0]
    return cast("T", result)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
