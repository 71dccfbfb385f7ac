"""The result of a kill, the file of all results, and their table by kind."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Kind of the result of a run that finished by itself.
FINISHED = "none: the run finishes"


@dataclass
class Result:
    """The result of one kill; `problems` is empty if all checks passed.

    `code`: exit code of the driver, None if it survived or hung. `steps_known`: a later start of the same command has
    logged a step, so `lost` and `doubled` are valid. `bit_equal`: None for a run that samples.
    """

    number: int
    kind: str
    stack: str
    phase: str
    code: int | None = None
    hung: bool = False
    seconds_to_end: float | None = None
    seconds_to_clean: float | None = None
    left: list[str] = field(default_factory=list)
    shared_memory: list[str] = field(default_factory=list)
    output_lines: int = 0
    steps_known: bool = False
    lost: list[int] = field(default_factory=list)
    doubled: list[int] = field(default_factory=list)
    bit_equal: bool | None = None
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        """One line about this kill."""
        end = "hung" if self.hung else "survived" if self.code is None else f"exit code {self.code}"
        if self.seconds_to_end is not None:
            end += f" after {self.seconds_to_end:.1f} s"
        if self.seconds_to_clean is not None:
            end += f", no process left after {self.seconds_to_clean:.1f} s"
        verdict = "; ".join(self.problems) or "ok"
        name = f"kill {self.number}, {self.kind}" if self.number else self.kind
        return f"{name} in {self.phase!r} of {self.stack}: {end}: {verdict}"


class ResultFile:
    """The results of a drill, written after each run, so that an interrupted drill can be resumed.

    `plan` identifies a drill: its seed, kills, kinds and stacks. Raises ValueError if the file is from another drill.
    """

    def __init__(self, path: str | Path, plan: dict[str, Any]) -> None:
        self._path, self._plan = Path(path), plan
        self.results: list[Result] = []
        if not self._path.exists():
            return
        content = json.loads(self._path.read_text())
        if content["plan"] != plan:
            raise ValueError(f"{path} is of a drill with {content['plan']}, this one has {plan}: use another file")
        self.results = [Result(**values) for values in content["results"]]

    @property
    def done(self) -> set[int]:
        """Numbers of the kills without problems. Failed kills are repeated."""
        return {result.number for result in self.results if result.number and not result.problems}

    def add(self, results: Sequence[Result]) -> None:
        """Add results, and write the file."""
        numbers = {result.number for result in results if result.number}
        self.results = [result for result in self.results if result.number not in numbers] + list(results)
        partial = self._path.with_name(f"{self._path.name}.partial")
        values = [dataclasses.asdict(result) for result in self.results]
        partial.write_text(json.dumps({"plan": self._plan, "results": values}, indent=1))
        os.replace(partial, self._path)


COLUMNS = (
    "kind",
    "kills",
    "failed",
    "processes left",
    "shared memory left",
    "hung",
    "s to end (max)",
    "s to clean (max)",
    "steps lost",
    "steps doubled",
    "bit-equal",
)


def table(results: Sequence[Result]) -> str:
    """A Markdown table: one row per kind, one for all kills, and one for runs that finished by themselves."""
    kills = [result for result in results if result.kind != FINISHED]
    kinds = sorted({result.kind for result in kills})
    rows = [_row(kind, [result for result in kills if result.kind == kind]) for kind in kinds]
    rows.append(_row("**all kills**", kills))
    rows.append(_row(FINISHED, [result for result in results if result.kind == FINISHED]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (list(COLUMNS), ["---"] * len(COLUMNS), *rows))


def _row(name: str, results: Sequence[Result]) -> list[str]:
    compared = [result.bit_equal for result in results if result.bit_equal is not None]
    return [
        name,
        str(len(results)),
        str(sum(bool(result.problems) for result in results)),
        str(sum(len(result.left) for result in results)),
        str(sum(len(result.shared_memory) for result in results)),
        str(sum(result.hung for result in results)),
        _largest([result.seconds_to_end for result in results]),
        _largest([result.seconds_to_clean for result in results]),
        str(sum(len(result.lost) for result in results)),
        str(sum(len(result.doubled) for result in results)),
        f"{sum(compared)} of {len(compared)}" if compared else "—",
    ]


def _largest(values: Sequence[Any]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.1f}" if known else "—"
