"""Who is waited for, and since when: pure bookkeeping on given times, from which a watchdog's lines are made.

begin("rollout 3/100") ──► advance() … advance() ──► end()
                     look(now, processes) ──► lines to print, or the reason to end the run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# A process that does not run for less than this is not mentioned.
MENTIONED_FROM_S = 10.0
# Lines about one wait come ever more rarely, up to this many intervals apart.
_LARGEST_FACTOR = 10


class Status(Enum):
    """What a look at a process found."""

    ALIVE = "alive"
    STOPPED = "stopped"  # by a signal (SIGSTOP), or in a debugger
    SILENT = "silent"  # it exists as far as anyone knows, and does not answer
    DEAD = "dead"


@dataclass(frozen=True)
class ProcessView:
    """One process as it was found. detail: what is known beside its status (its id, how it died)."""

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
    """Lines to print, and why the run has to end (None: it goes on)."""

    lines: tuple[str, ...] = ()
    failure: str | None = None


class Watch:
    """The state of one run's waits. Times are seconds of any one clock.

    interval_s: a line after this long without progress (0: never). timeout_s: the end of the run after this long (0: never).
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
        """What the run is doing; None between its activities."""
        return self._activities[-1][0] if self._activities else None

    def begin(self, activity: str, now: float) -> None:
        """An activity starts; it may be part of another."""
        self._activities.append((activity, now))
        self._done = 0
        self.advance(now)

    def end(self, now: float) -> None:
        """The latest activity is over."""
        self._activities.pop()
        self._done = 0
        self.advance(now)

    def advance(self, now: float, count: int = 0, unit: str = "") -> None:
        """Something has advanced: `count` more of the activity's samples, micro-batches or other units."""
        self._done, self._unit = self._done + count, unit
        self._advanced_at, self._factor = now, 1

    def idle_s(self, now: float) -> float:
        """Seconds since something advanced, of the activity that is waited for; 0 where nothing is."""
        return now - self._advanced_at if self._activities else 0.0

    def look(self, now: float, processes: Sequence[ProcessView]) -> Findings:
        """What there is to say of the run at `now`."""
        dead = [process for process in processes if process.status is Status.DEAD]
        if dead:
            return Findings(failure="; ".join(map(str, dead)))
        lines = self._responsiveness(now, processes)
        idle = self.idle_s(now)
        if self._timeout_s and idle >= self._timeout_s:
            return Findings(
                tuple(lines),
                f"nothing has advanced for {idle:.0f} s (--watchdog-timeout-s {self._timeout_s:g}): {self._waited_for(now, processes)}",
            )
        if self._interval_s and idle >= self._interval_s * self._factor:
            # After 1, 2, 4, 8, 16, 26, 36, … intervals.
            self._factor += min(self._factor, _LARGEST_FACTOR)
            lines.append(f"nothing has advanced for {idle:.0f} s: {self._waited_for(now, processes)}")
        return Findings(tuple(lines))

    def _waited_for(self, now: float, processes: Sequence[ProcessView]) -> str:
        activity, since = self._activities[-1]
        progress = f", {self._done} {self._unit} done" if self._done else ""
        return f"{activity} for {now - since:.0f} s{progress}; {summary(processes)}"

    def _responsiveness(self, now: float, processes: Sequence[ProcessView]) -> list[str]:
        """Lines about processes that stopped answering, or answer again."""
        lines = []
        for process in processes:
            if process.status is Status.ALIVE:
                since, status = self._unresponsive.pop(process.name, (now, process.status))
                if process.name in self._mentioned:
                    self._mentioned.discard(process.name)
                    what = "was stopped" if status is Status.STOPPED else "did not answer"
                    lines.append(f"waited {now - since:.0f} s for {process.name}, which {what}; it goes on")
                continue
            since, _ = self._unresponsive.setdefault(process.name, (now, process.status))
            if now - since >= MENTIONED_FROM_S and process.name not in self._mentioned:
                self._mentioned.add(process.name)
                lines.append(f"{process}, for {now - since:.0f} s so far; waiting for it")
        return lines


def summary(processes: Sequence[ProcessView]) -> str:
    """All processes in a few words: those that are alive are counted, the others named."""
    others = [str(process) for process in processes if process.status is not Status.ALIVE]
    alive = [process.name for process in processes if process.status is Status.ALIVE]
    if len(alive) > 4:
        alive = [f"{len(alive)} others" if others else f"all {len(alive)} processes"]
    parts = [*others, *([f"{', '.join(alive)} alive"] if alive else [])]
    return "; ".join(parts) or "no process of the run is watched"
