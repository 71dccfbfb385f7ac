"""What a look at a run found: sentences, by what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from slime_opd.errors import SlimeOPDError


@dataclass
class Findings:
    """What was found: problems, what could not be checked and why, what was looked at and is in order, figures, and a table of what differs."""

    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    fine: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """As they are printed, the problems last."""
        yield from (f"ok           {line}" for line in self.fine)
        yield from (f"memory       {line}" for line in self.figures)
        yield from (f"not checked  {line}" for line in self.unchecked)
        yield from (f"differs      {line}" for line in self.differences)
        yield from (f"problem      {line}" for line in self.problems)


def attempt(found: Findings, look: Callable[[], Any]) -> Any:
    """What `look` gives; a sentence is noted as fine, an error as a problem."""
    try:
        result = look()
    except SlimeOPDError as error:
        found.problems += str(error).splitlines()
        return None
    if isinstance(result, str):
        found.fine.append(result)
    return result


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
