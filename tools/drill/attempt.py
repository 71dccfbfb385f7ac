"""One start of a run's command: its processes, its output, its metrics, and the moments at which it is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from drill.kinds import WITH_ENGINE, Phase, Role
from drill.plan import Trial
from drill.processes import MARK, Process, descendants, marked
from drill.stacks import SAVE_INTERVAL, environment

T = TypeVar("T")

# Seconds that a run may take to do the next thing, on a machine that is busy with others.
PROGRESS_LIMIT_S = 300
_CLOSE_LIMIT_S = 60
_POLL_S = 0.01
# A kill in the start-up comes up to this long after a process has appeared.
_START_SPREAD_S = 3.0
_TERMINAL = Path(__file__).with_name("terminal.py")
_TRACKER = "latest_checkpointed_iteration.txt"


class Ended(Exception):
    """The driver has ended while the drill waited for something else."""


class Stuck(Exception):
    """What the drill waited for has not happened within its limit."""


class Attempt:
    """A running command that writes checkpoints to `save` and metrics to `save`/run."""

    def __init__(self, command: Sequence[str], save: Path, log: Path, *, in_terminal: bool = False) -> None:
        self.mark = secrets.token_hex(8)
        self.save, self.log = save, log
        self.saved_before = saved_step(save)
        self._begun = time.time()
        # Ray's sockets have a path of at most 107 bytes, so not below the work directory.
        self._ray_directory = Path(tempfile.mkdtemp(prefix="drill_", dir="/tmp"))
        # setproctitle, which Ray and SGLang call, would write a long title over the environment, and so over the mark.
        own = {**environment(), MARK: self.mark, "SPT_NOENV": "1", "RAY_TMPDIR": str(self._ray_directory)}
        # The drill alone kills, however full the machine's memory is.
        own["RAY_memory_monitor_refresh_ms"] = "0"
        self._is_hung_up, self._screen = threading.Event(), None
        if in_terminal:
            self._process = self._start_in_terminal(command, own)
        else:
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=own,
                    start_new_session=True,
                )
        self.known: dict[int, Process] = {}
        self._size, self._records = 0, []

    @property
    def pid(self) -> int:
        """Process id of the driver, and of its process group."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """The driver's exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def processes(self) -> list[Process]:
        """The live processes of this start; all that were ever seen are kept in `known`."""
        found = marked(self.mark, self.pid)
        self.known.update({process.pid: process for process in found})
        return found

    def note_descendants(self) -> None:
        """Add to `known` what the driver's processes have started with an environment of its own, without the mark."""
        for process in descendants(self.pid):
            self.known.setdefault(process.pid, process)

    def left(self) -> list[Process]:
        """What is alive of all processes of this start, the driver included."""
        current = {process.pid for process in self.processes()}
        return [process for pid, process in self.known.items() if pid in current or process.is_alive()]

    def records(self) -> list[dict[str, Any]]:
        """The metrics of the training steps that this start has logged."""
        size = _size(metrics_file(self.save))
        if size != self._size:
            self._size = size
            self._records = [record for record in read_records(self.save) if record["time"] >= self._begun]
        return self._records

    def steps(self) -> list[int]:
        """The training steps that this start has logged, in order."""
        return [record["step"] for record in self.records()]

    def output(self, start: int = 0) -> str:
        """What it has printed, from an offset in bytes on, without a terminal's colours."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.log.read_bytes()[start:].decode(errors="replace"))

    def hang_up(self) -> None:
        """Close its terminal."""
        self._is_hung_up.set()
        if self._screen is not None:
            self._screen.join()

    def wait(self, look: Callable[[], T | None], limit_s: float | None = None, poll_s: float = _POLL_S) -> T:
        """What `look` finds. Raises Ended when the driver has ended first, Stuck after `limit_s` seconds (unset: PROGRESS_LIMIT_S)."""
        limit_s = PROGRESS_LIMIT_S if limit_s is None else limit_s
        deadline = time.monotonic() + limit_s
        while True:
            # In this order, so that what the driver did last is seen.
            has_ended = self.exit_code() is not None
            found = look()
            if found:
                return found
            if has_ended:
                raise Ended(f"exit code {self.exit_code()}")
            if time.monotonic() > deadline:
                raise Stuck(f"nothing for {limit_s:g} s")
            time.sleep(poll_s)

    def wait_end(self, limit_s: float) -> int | None:
        """The driver's exit code, or None when it still runs after `limit_s` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(limit_s)
        return None

    def close(self) -> None:
        """Kill what is left of it. Raises RuntimeError where that does not end."""
        deadline = time.monotonic() + _CLOSE_LIMIT_S
        while left := self.left():
            if time.monotonic() > deadline:
                raise RuntimeError(f"could not kill {', '.join(map(str, left))} in {_CLOSE_LIMIT_S:g} s")
            for process in left:
                process.send(signal.SIGKILL)
            self._process.poll()
            time.sleep(_POLL_S)
        self._process.wait()
        self.hang_up()
        shutil.rmtree(self._ray_directory, ignore_errors=True)

    def _start_in_terminal(self, command: Sequence[str], own: dict[str, str]) -> subprocess.Popen[bytes]:
        ours, theirs = os.openpty()
        started = [sys.executable, "-S", str(_TERMINAL), os.ttyname(theirs), *command]
        process = subprocess.Popen(started, env=own, start_new_session=True)
        self.log.write_bytes(b"")
        self._screen = threading.Thread(target=self._copy_output, args=(ours, theirs), daemon=True)
        self._screen.start()
        return process

    def _copy_output(self, ours: int, theirs: int) -> None:
        """Write what comes out of the terminal to the log, until it is to be closed."""
        with self.log.open("ab", buffering=0) as log:
            while not self._is_hung_up.is_set():
                if select.select([ours], [], [], _POLL_S)[0]:
                    log.write(os.read(ours, 65536))
        # Not in hang_up: a descriptor that another thread reads is not closed until that has read something.
        os.close(ours)
        os.close(theirs)


def read_records(save: Path) -> list[dict[str, Any]]:
    """The metrics of all training steps, by all starts; a line that is being written is left out."""
    path = metrics_file(save)
    content = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = content[: content.rfind("\n") + 1].splitlines()
    return [record for record in map(json.loads, lines) if "train/loss" in record]


def metrics_file(save: Path) -> Path:
    """Where a run without --run-dir keeps its metrics."""
    return save / "run" / "metrics.jsonl"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def saved_step(save: Path) -> int:
    """The step of the last checkpoint; 0 where there is none."""
    tracker = save / _TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0


def moments(attempt: Attempt, trial: Trial) -> Iterator[None]:
    """Waits for moments that suit a trial, one after the other, and yields at each.

    Ends when there can be no more of them in this start; raises Ended or Stuck as `Attempt.wait` does.
    """
    if trial.phase is Phase.START:
        yield from _in_start(attempt, trial)
    elif trial.phase is Phase.SAVE:
        yield from _in_save(attempt, trial)
    else:
        yield from _in_step(attempt, trial)


def _in_start(attempt: Attempt, trial: Trial) -> Iterator[None]:
    anchors = [Role.GCS, Role.RAYLET, Role.TRAINER, *([Role.SCHEDULER] if trial.stack in WITH_ENGINE else [])]
    anchor = anchors[int(trial.fraction * len(anchors))]
    role = anchor if trial.kind.role is Role.DRIVER else trial.kind.role
    attempt.wait(lambda: any(process.role is role for process in attempt.processes()), poll_s=0.1)
    time.sleep(_START_SPREAD_S * (trial.fraction * 7 % 1))
    while not attempt.steps():
        yield
        time.sleep(0.1)


def _in_save(attempt: Attempt, trial: Trial) -> Iterator[None]:
    while True:
        # Not one that an earlier start has left: it is removed when the next save begins.
        begun = len(attempt.steps())
        attempt.wait(lambda begun=begun: len(attempt.steps()) > begun and attempt.steps()[-1] % SAVE_INTERVAL == 0)
        attempt.wait(lambda: any(attempt.save.glob("*.partial")))
        time.sleep(0.3 * trial.fraction)
        deadline = time.monotonic() + 2
        yield
        while any(attempt.save.glob("*.partial")) and time.monotonic() < deadline:
            yield


def _in_step(attempt: Attempt, trial: Trial) -> Iterator[None]:
    """Aims by the durations of the step before: its parts take about as long in the next step."""
    wanted = max(trial.after, 1) + len(attempt.steps())
    while True:
        # After a step that is saved the next one begins later.
        attempt.wait(lambda wanted=wanted: len(attempt.steps()) >= wanted and attempt.steps()[-1] % SAVE_INTERVAL != 0)
        last = attempt.records()[-1]
        time.sleep(delay_in_step(trial.phase, trial.fraction, last))
        yield
        wanted = len(attempt.steps()) + 1


def delay_in_step(phase: Phase, fraction: float, last: dict[str, Any]) -> float:
    """Seconds from the end of a step, whose metrics are `last`, to `fraction` of a phase of the next one."""
    parts = ((Phase.UPDATE_WEIGHTS, "update_weights"), (Phase.GENERATE, "rollout"), (Phase.TRAIN, "train"))
    delay = 0.0
    for part, name in parts:
        seconds = last.get(f"perf/{name}_time", 0.0)
        if part is phase:
            return delay + fraction * seconds
        delay += seconds
    raise ValueError(f"{phase} is no part of a step")
