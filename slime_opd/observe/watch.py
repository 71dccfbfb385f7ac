"""State of a watchdog: activities, their progress, and processes that do not respond. Pure; times are arguments.

begin("rollout 3/100") ──► advance() … advance() ──► end()
                     look(now, processes) ──► lines to print, or the reason to end the run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# Seconds without a response after which a process is mentioned.
MENTIONED_FROM_S = 10.0
# The interval between lines about one wait doubles up to this many intervals.
_MAX_FACTOR = 10


class Status(Enum):
    """Status of a process."""

    ALIVE = "alive"
    STOPPED = "stopped"  # by a signal (SIGSTOP), or in a debugger
    SILENT = "silent"  # it does not answer, and is not known to be dead
    DEAD = "dead"


@dataclass(frozen=True)
class ProcessView:
    """The status of one process. `detail`: further facts for messages (its id, its exit code)."""

    name: str
    status: Status
    detail: str = ""

    def __str__(self) -> str:
        verbs = {
            Status.ALIVE: "is alive",
            Status.STOPPED: "is stopped",
            Status.SILENT: "does not answer",
            Status.DEAD: "died",
        }
        return f"{self.name} {verbs[self.status]}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Findings:
    """Lines to print, and the reason why the run has to end (None: it continues)."""

    lines: tuple[str, ...] = ()
    failure: str | None = None


class Watch:
    """The state of one run's waits. Times are seconds of one clock.

    `interval_s`: without progress for this long, a line is printed (0: never). `timeout_s`: without progress for this
    long, the run ends (0: never).
    """

    def __init__(self, interval_s: float, timeout_s: float) -> None:
        self._interval_s, self._timeout_s = interval_s, timeout_s
        self._activities: list[tuple[str, float]] = []
        self._done, self._unit = 0, ""
        self._advanced_at = 0.0
        self._factor = 1
        self._unresponsive: dict[str, tuple[float, Status]] = {}
        self._mentioned: set[str] = set()

    @property
    def activity(self) -> str | None:
        """The current activity; None between activities."""
        return self._activities[-1][0] if self._activities else None

    def begin(self, activity: str, now: float) -> None:
        """Start an activity, which may be nested in another."""
        self._activities.append((activity, now))
        self._done = 0
        self.advance(now)

    def end(self, now: float) -> None:
        """End the innermost activity."""
        self._activities.pop()
        self._done = 0
        self.advance(now)

    def advance(self, now: float, count: int = 0, unit: str = "") -> None:
        """Note progress: `count` more samples, micro-batches or other units of the activity are done."""
        self._done, self._unit = self._done + count, unit
        self._advanced_at, self._factor = now, 1

    def idle_s(self, now: float) -> float:
        """Seconds since the last progress; 0 between activities."""
        return now - self._advanced_at if self._activities else 0.0

    def look(self, now: float, processes: Sequence[ProcessView]) -> Findings:
        """The findings at time `now`, given the status of all processes."""
        dead = [process for process in processes if process.status is Status.DEAD]
        if dead:
            return Findings(failure="; ".join(map(str, dead)))
        lines = self._responsiveness(now, processes)
        idle = self.idle_s(now)
        if self._timeout_s and idle >= self._timeout_s:
            return Findings(
                tuple(lines),
                f"nothing has advanced for {idle:.0f} s (--watchdog-timeout-s {self._timeout_s:g}): "
                f"{self._waited_for(now, processes)}",
            )
        if self._interval_s and idle >= self._interval_s * self._factor:
            # After 1, 2, 4, 8, 16, 26, 36, … intervals.
            self._factor += min(self._factor, _MAX_FACTOR)
            lines.append(f"nothing has advanced for {idle:.0f} s: {self._waited_for(now, processes)}")
        return Findings(tuple(lines))

    def _waited_for(self, now: float, processes: Sequence[ProcessView]) -> str:
        activity, since = self._activities[-1]
        progress = f", {self._done} {self._unit} done" if self._done else ""
        return f"{activity} for {now - since:.0f} s{progress}; {summary(processes)}"

    def _responsiveness(self, now: float, processes: Sequence[ProcessView]) -> list[str]:
        """Lines about processes that stopped responding, or respond again."""
        lines = []
        for process in processes:
            if process.status is Status.ALIVE:
                since, status = self._unresponsive.pop(process.name, (now, process.status))
                if process.name in self._mentioned:
                    self._mentioned.discard(process.name)
                    what = "was stopped" if status is Status.STOPPED else "did not answer"
                    lines.append(f"waited {now - since:.0f} s for {process.name}, which {what}; it responds again")
                continue
            since, _ = self._unresponsive.setdefault(process.name, (now, process.status))
            if now - since >= MENTIONED_FROM_S and process.name not in self._mentioned:
                self._mentioned.add(process.name)
                lines.append(f"{process}, for {now - since:.0f} s so far; waiting for it")
        return lines


def summary(processes: Sequence[ProcessView]) -> str:
    """One line about all processes: names of those that do not respond, names or count of those that are alive."""
    others = [str(process) for process in processes if process.status is not Status.ALIVE]
    alive = [process.name for process in processes if process.status is Status.ALIVE]
    if len(alive) > 4:
        alive = [f"{len(alive)} others" if others else f"all {len(alive)} processes"]
    parts = [*others, *([f"{', '.join(alive)} alive"] if alive else [])]
    return "; ".join(parts) or "no process of the run is watched"
