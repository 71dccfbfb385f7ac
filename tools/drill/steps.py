"""Steps that a start of a run has lost or done twice, and steps that its metrics lack at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepCheck:
    """`lost`: steps that a start has skipped; `doubled`: steps that it has repeated."""

    lost: tuple[int, ...]
    doubled: tuple[int, ...]


def check_start(steps: Sequence[int], saved: int) -> StepCheck:
    """The check of a start that found `saved` steps in the last checkpoint, and then logged `steps` (from 1).

    It has to continue with the step after the checkpoint, and do each step once.
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
    """The steps from 1 to `last` without a record."""
    return tuple(sorted(set(range(1, last + 1)) - set(steps)))


def indistinct(records: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """The steps with several records of one attempt, of which a reader cannot know the valid one."""
    counts = Counter((record["step"], record.get("attempt")) for record in records)
    return tuple(sorted({step for (step, _), count in counts.items() if count > 1}))
