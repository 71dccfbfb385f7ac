"""Checks of a run's behaviour after a kill."""

from __future__ import annotations

from drill.kinds import Kind, Outcome
from drill.results import Result

_DUMPS = ("Traceback (most recent call last)", "Fatal Python error", "Stack trace", "*** SIG")


def problems_of(result: Result, kind: Kind, output: str, clean_limit_s: float) -> list[str]:
    """One line per problem; `output`: the run's output after the kill."""
    problems = []
    if result.hung:
        problems.append(f"hung for {result.seconds_to_end:.0f} s")
    elif result.code is None:
        if kind.outcome is Outcome.ENDS:
            problems.append("survived, expected it to end")
    else:
        problems += _problems_of_end(result.code, kind, output)
    if result.left:
        problems.append(f"left after {clean_limit_s:g} s: {', '.join(result.left)}")
    if result.shared_memory:
        problems.append(f"left in /dev/shm: {', '.join(result.shared_memory)}")
    return problems


def _problems_of_end(code: int, kind: Kind, output: str) -> list[str]:
    if kind.outcome is Outcome.SURVIVES:
        return [f"exit code {code}, expected it to survive"]
    problems = []
    if code not in kind.codes:
        problems.append(f"exit code {code}, expected {' or '.join(map(str, kind.codes))}")
    if not any(line.startswith(kind.sentence) for line in ["", *output.splitlines()]):
        problems.append(f"no line that starts with {kind.sentence!r}")
    problems += [f"printed {dump!r}" for dump in _DUMPS if dump in output]
    return problems
