"""The watchdog of a run: reports what the run is waiting for, and ends it when a process died or nothing advances.

A thread polls the run's processes. The driver's waits (`get`, and the background loop's through `check`) wake up every
second and raise the failure that the thread has detected. So a run always ends on the main thread, through every
`finally`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from slime_opd.cluster import deaths, ray_processes
from slime_opd.engine import health
from slime_opd.errors import ProcessDied
from slime_opd.observe import console
from slime_opd.observe.watch import ProcessView, Status, Watch

POLL_PERIOD_S = 2.0
# Seconds between two checks for a failure while the driver waits.
_WAIT_SLICE_S = 1.0
# Seconds in which further ranks may fail, so that the root cause can be distinguished from its consequences.
_ROOT_CAUSE_GRACE_S = 5.0
# An external server is asked for its health after this long without progress, and has this long to answer.
_ASK_AFTER_S, _ANSWER_TIMEOUT_S = 5.0, 5.0

Probe = Callable[[], list[ProcessView]]


class Watchdog:
    """Watchdog of one run, a context manager. `interval_s`, `timeout_s`: see `Watch`. `report` prints a warning."""

    def __init__(self, interval_s: float, timeout_s: float, *, report: Callable[[str], None] = console.warn) -> None:
        self._watch = Watch(interval_s, timeout_s)
        self._report = report
        self._probes: list[Probe] = []
        self._failure: ProcessDied | None = None
        self._has_raised = False
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._memory = deaths.Memory.now()
        # The activity in which the run failed, for its last message.
        self.failed_in: str | None = None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; a poll that still waits for an answer reports nothing."""
        self._closing.set()
        if self._thread.is_alive():
            # A daemon thread: it may hang in a call to a Ray that has died.
            self._thread.join(timeout=1.0)

    def add(self, probe: Probe) -> None:
        """Add a probe, which the watchdog's thread calls every POLL_PERIOD_S seconds."""
        self._probes.append(probe)

    def add_server(self, name: str, url: str) -> None:
        """Add a server that is asked for its health while nothing advances."""

        def ask() -> list[ProcessView]:
            # While the run advances, the server is known to answer.
            is_alive = self.idle_s() < _ASK_AFTER_S or health.answers(url, _ANSWER_TIMEOUT_S)
            return [ProcessView(f"{name} {url}", Status.ALIVE if is_alive else Status.SILENT)]

        self.add(ask)

    @contextmanager
    def waiting_for(self, activity: str) -> Iterator[None]:
        """Context in which the run waits for `activity`."""
        with self._lock:
            self._watch.begin(activity, time.monotonic())
        try:
            yield
        except BaseException:
            # The innermost activity is the one that failed.
            self.failed_in = self.failed_in or activity
            raise
        finally:
            with self._lock:
                self._watch.end(time.monotonic())

    def advance(self, count: int = 0, unit: str = "") -> None:
        """Note progress, from any thread: `count` more units of the activity are done."""
        with self._lock:
            self._watch.advance(time.monotonic(), count, unit)

    def idle_s(self) -> float:
        """Seconds since the last progress; 0 outside of any activity."""
        with self._lock:
            return self._watch.idle_s(time.monotonic())

    def check(self) -> None:
        """Raise a detected failure, but only once: the clean-up that follows must not fail because of it."""
        if self._has_raised:
            return
        # Ray's own processes are checked here, because without them the watchdog's thread may hang in a call to Ray.
        dead = [view for view in ray_processes.look() if view.status is Status.DEAD]
        if dead and self._failure is None:
            self._fail("; ".join(map(str, dead)))
        if self._failure is not None:
            self._has_raised = True
            raise self._failure

    def get(self, refs: Sequence[Any], names: Sequence[str], timeout_s: float | None = None) -> list[Any]:
        """The results of Ray calls, one for each of the processes `names`; all have to succeed.

        Raises ProcessDied, or the exception of a call: as an error of this package if its cause is known, else (a bug)
        unchanged.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self.check()
            try:
                return ray.get(list(refs), timeout=_WAIT_SLICE_S)
            except ray.exceptions.GetTimeoutError as timeout:
                if deadline is not None and time.monotonic() > deadline:
                    _, pending = ray.wait(list(refs), num_returns=len(refs), timeout=0)
                    late = [name for name, ref in zip(names, refs, strict=True) if ref in pending]
                    raise ProcessDied(f"no answer within {timeout_s:g} s from {', '.join(late)}") from timeout
            except Exception as error:
                raise self._explained(error, refs, names) from error

    def memory(self) -> str:
        """The memory of the driver's machine, for an error message."""
        return deaths.Memory.now().describe_since(self._memory)

    def _explained(self, error: Exception, refs: Sequence[Any], names: Sequence[str]) -> Exception:
        self.check()
        grace_s = 0.0 if deaths.explains_others(error) or len(refs) == 1 else _ROOT_CAUSE_GRACE_S
        failures = self._failures(refs, names, grace_s)
        name, cause = deaths.root_cause(failures or [(names[0], error)])
        self._has_raised = True
        return deaths.describe(name, cause, self.memory()) or cause

    def _failures(self, refs: Sequence[Any], names: Sequence[str], grace_s: float) -> list[tuple[str, Exception]]:
        """Names and exceptions of the processes that fail within `grace_s` seconds."""
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=grace_s)
        failures = []
        for name, ref in zip(names, refs, strict=True):
            if ref in ready:
                try:
                    ray.get(ref, timeout=0)
                except Exception as error:
                    failures.append((name, error))
        return failures

    def _run(self) -> None:
        while not self._closing.wait(POLL_PERIOD_S):
            self._look()

    def _look(self) -> None:
        """Poll every process once; report what is new."""
        views = [view for probe in self._probes for view in _views(probe)]
        with self._lock:
            findings = self._watch.look(time.monotonic(), views)
        if self._closing.is_set() or self._failure is not None:
            return
        for line in findings.lines:
            self._report(line)
        if findings.failure is not None:
            self._fail(findings.failure)

    def _fail(self, what: str) -> None:
        self._failure = ProcessDied(f"{what}; {self.memory()}")
        # Reported at once, because ending the run may take a while.
        self._report(f"{what}: the run ends")


def _views(probe: Probe) -> list[ProcessView]:
    try:
        return probe()
    except ray.exceptions.RayError as error:
        return [ProcessView("Ray", Status.SILENT, deaths.first_sentence(str(error)))]
