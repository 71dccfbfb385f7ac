"""Which steps one start of a run has lost or done twice, and which are in its metrics at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepCheck:
    """Steps that a start skipped, and steps that it did again."""

    lost: tuple[int, ...]
    doubled: tuple[int, ...]


def check_start(steps: Sequence[int], saved: int) -> StepCheck:
    """The check of a start that found `saved` steps in the last checkpoint, and then logged `steps` (from 1).

    It has to continue with the step after the checkpoint and do each step once.
    """
    expected = set(range(saved + 1, max(steps, default=saved) + 1))
    done: set[int] = set()
    doubled = []
    for step in steps:
        if step <= saved or step in done:
            doubled.append(step)
        done.add(step)
    return StepCheck(tuple(sorted(expected - done)), tuple(doubled))


def missing(steps: Sequence[int], last: int) -> tuple[int, ...]:
    """The steps from 1 to `last` that have no record."""
    return tuple(sorted(set(range(1, last + 1)) - set(steps)))


def indistinct(records: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """The steps with two records of one attempt, which a reader of the metrics cannot tell apart."""
    seen: set[tuple[int, Any]] = set()
    found = set()
    for record in records:
        key = (record["step"], record.get("attempt"))
        if key in seen:
            found.add(record["step"])
        seen.add(key)
    return tuple(sorted(found))
