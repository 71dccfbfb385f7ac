"""The watchdog of a run: it says who is waited for, and ends the run where a process is dead or nothing advances any more.

A thread looks at the run's processes; the driver's own waits (`get`, and the background loop's, by way of `check`) come back
every second to raise what it found, so that a run always ends on the main thread and by way of every `finally`.
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

LOOK_PERIOD_S = 2.0
# Seconds of a wait in the driver between two looks at what the watchdog has found.
_SLICE_S = 1.0
# Seconds that other ranks are given to fail too, so that the first failure can be told from those that follow from it.
_ROOT_CAUSE_GRACE_S = 5.0
# A server that is not the run's own is asked once nothing has advanced for this long, and has this long to answer.
_ASK_AFTER_S, _ANSWER_TIMEOUT_S = 5.0, 5.0

Probe = Callable[[], list[ProcessView]]


class Watchdog:
    """One run's watchdog. interval_s, timeout_s: see `Watch`. A context manager; `close` ends its thread.

    report: prints a line that stands out; there for tests.
    """

    def __init__(self, interval_s: float, timeout_s: float, *, report: Callable[[str], None] = console.warn) -> None:
        self._watch = Watch(interval_s, timeout_s)
        self._report = report
        self._probes: list[Probe] = []
        self._failure: ProcessDied | None = None
        self._raised = False
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._memory = deaths.Memory.now()
        # What the run was doing when it failed, for its last words.
        self.failed_in: str | None = None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; a look that still waits for an answer reports nothing any more."""
        self._closing.set()
        if self._thread.is_alive():
            # A daemon thread, which may hang in a call to a Ray that is gone.
            self._thread.join(timeout=1.0)

    def add(self, probe: Probe) -> None:
        """Look at what `probe` finds too, every LOOK_PERIOD_S seconds, from the watchdog's thread."""
        self._probes.append(probe)

    def add_server(self, name: str, url: str) -> None:
        """Ask a server whether it answers, while nothing advances."""

        def ask() -> list[ProcessView]:
            # What advances needs its answers: only a wait leaves a doubt.
            alive = self.idle_s() < _ASK_AFTER_S or health.answers(url, _ANSWER_TIMEOUT_S)
            return [ProcessView(f"{name} {url}", Status.ALIVE if alive else Status.SILENT)]

        self.add(ask)

    @contextmanager
    def waiting_for(self, activity: str) -> Iterator[None]:
        """While inside, the run waits for this."""
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
        """Note progress, from any thread: `count` more of the activity's units."""
        with self._lock:
            self._watch.advance(time.monotonic(), count, unit)

    def idle_s(self) -> float:
        """Seconds since something advanced; 0 while nothing is waited for."""
        with self._lock:
            return self._watch.idle_s(time.monotonic())

    def check(self) -> None:
        """Raise what was found, once: what is done to end the run must not fail of it again."""
        if self._raised:
            return
        # Ray's own processes are looked at here: without them the watchdog's thread may hang in a call to Ray.
        dead = [view for view in ray_processes.look() if view.status is Status.DEAD]
        if dead and self._failure is None:
            self._fail("; ".join(map(str, dead)))
        if self._failure is not None:
            self._raised = True
            raise self._failure

    def get(self, refs: Sequence[Any], names: Sequence[str], timeout_s: float | None = None) -> list[Any]:
        """The results of Ray calls to the processes `names`, which all have to succeed.

        Raises ProcessDied, or what the calls raised, as a sentence where there is one, else as it is (a bug).
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self.check()
            try:
                return ray.get(list(refs), timeout=_SLICE_S)
            except ray.exceptions.GetTimeoutError as timeout:
                if deadline is not None and time.monotonic() > deadline:
                    _, pending = ray.wait(list(refs), num_returns=len(refs), timeout=0)
                    late = [name for name, ref in zip(names, refs, strict=True) if ref in pending]
                    raise ProcessDied(f"no answer within {timeout_s:g} s from {', '.join(late)}") from timeout
            except Exception as error:
                raise self._explained(error, refs, names) from error

    def memory(self) -> str:
        """The driver's machine's memory, for a sentence."""
        return deaths.Memory.now().since(self._memory)

    def _explained(self, error: Exception, refs: Sequence[Any], names: Sequence[str]) -> Exception:
        self.check()
        grace_s = 0.0 if deaths.explains_others(error) or len(refs) == 1 else _ROOT_CAUSE_GRACE_S
        failures = self._failures(refs, names, grace_s)
        name, cause = deaths.root_cause(failures or [(names[0], error)])
        self._raised = True
        return deaths.sentence(name, cause, self.memory()) or cause

    def _failures(self, refs: Sequence[Any], names: Sequence[str], grace_s: float) -> list[tuple[str, Exception]]:
        """Who failed with what, of those that fail within `grace_s` seconds."""
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=grace_s)
        found = []
        for name, ref in zip(names, refs, strict=True):
            if ref in ready:
                try:
                    ray.get(ref, timeout=0)
                except Exception as error:
                    found.append((name, error))
        return found

    def _run(self) -> None:
        while not self._closing.wait(LOOK_PERIOD_S):
            self._look()

    def _look(self) -> None:
        """One look at everything."""
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
        # At once: what ends the run may take its time.
        self._report(f"{what}: the run ends")


def _views(probe: Probe) -> list[ProcessView]:
    try:
        return probe()
    except ray.exceptions.RayError as error:
        return [ProcessView("Ray", Status.SILENT, deaths.first_sentence(str(error)))]
