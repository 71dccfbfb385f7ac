"""The findings of the checks before a run: sentences by severity, and how they are printed."""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from slime_opd.errors import SlimeOPDError


@dataclass
class Findings:
    """Problems, checks that could not be made, checks that passed, notes, memory figures, a table of differences.

    `internal_errors` are exceptions of a check itself. `--check` counts them as problems; a run starts all the same.
    """

    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    ok: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    internal_errors: list[str] = field(default_factory=list)

    def lines(self, width: int | None = None) -> Iterator[str]:
        """The printed lines: groups by kind, problems last, and a closing line; wrapped at `width` columns if given."""
        groups = (
            ("ok", self.ok),
            ("note", self.notes),
            ("memory", self.figures),
            ("not checked", self.unchecked),
            ("differs", self.differences),
            ("problem", self._all_problems),
        )
        for label, sentences in groups:
            for sentence in sentences:
                # A table is wider than a terminal rather than broken.
                yield from _wrapped(f"{label:<11}  {_printable(sentence)}", width if label != "differs" else None)
        yield self.closing_line

    @property
    def _all_problems(self) -> list[str]:
        # What two rules find, or one rule for two flags, is one problem.
        return list(dict.fromkeys(self.problems + self.internal_errors))

    @property
    def closing_line(self) -> str:
        """`ready: …`, or how many problems there are."""
        count, skipped = len(self._all_problems), len(self.unchecked)
        aside = f", {skipped} {'thing was' if skipped == 1 else 'things were'} not checked" if skipped else ""
        if count:
            return f"{count} {'problem' if count == 1 else 'problems'}{aside}"
        return f"ready: no problem was found{aside}"

    @property
    def exit_code(self) -> int:
        """Of `--check`: 0 where the run is ready, 2 where there is a problem."""
        return 2 if self._all_problems else 0


def attempt(found: Findings, inspect: Callable[[], Any]) -> Any:
    """The result of `inspect`; a sentence is added to `ok`, an error to `problems`, with None as the result."""
    try:
        result = inspect()
    except SlimeOPDError as error:
        found.problems += str(error).splitlines()
        return None
    if isinstance(result, str):
        found.ok.append(result)
    return result


def guarded(found: Findings, name: str, inspect: Callable[[], object]) -> None:
    """Run an inspection; an unexpected exception becomes a sentence that names the inspection."""
    try:
        attempt(found, inspect)
    except Exception as error:
        found.internal_errors.append(f"not checked: {name} ({internal_error(error)})")


def internal_error(error: Exception) -> str:
    """An unexpected exception in one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"internal error: {type(error).__name__}: {one_line(error)}{place}; please report it"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _printable(sentence: str) -> str:
    return sentence.encode("utf-8", "replace").decode("utf-8").replace("\n", " ")


def _wrapped(line: str, width: int | None) -> list[str]:
    if width is None:
        return [line]
    # Paths and flags stay whole, to be copied.
    return textwrap.wrap(line, width, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False)
