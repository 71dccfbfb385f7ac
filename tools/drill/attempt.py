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
from functools import partial
from pathlib import Path
from typing import Any

from drill.kinds import WITH_ENGINE, Phase, Role
from drill.plan import Trial
from drill.processes import MARK, Process, descendants, marked
from drill.stacks import SAVE_INTERVAL, environment

# Seconds to wait for the next step of a run, on a busy machine.
PROGRESS_LIMIT_S = 300
_CLOSE_LIMIT_S = 60
_POLL_S = 0.01
# A kill during the start happens up to this long after a process has appeared.
_START_SPREAD_S = 3.0
_TERMINAL = Path(__file__).with_name("terminal.py")
_TRACKER = "latest_checkpointed_iteration.txt"


class Ended(Exception):
    """The driver ended while the drill waited for something else."""


class Stuck(Exception):
    """The condition that the drill waited for did not hold within the limit."""


class Attempt:
    """A running command that writes checkpoints to `save` and metrics to `save`/run."""

    def __init__(self, command: Sequence[str], save: Path, log: Path, *, in_terminal: bool = False) -> None:
        self.mark = secrets.token_hex(8)
        self.save, self.log = save, log
        self.saved_before = saved_step(save)
        self._begun = time.time()
        # Ray's sockets have a path of at most 107 bytes, so not below the work directory.
        self._ray_directory = Path(tempfile.mkdtemp(prefix="drill_", dir="/tmp"))
        # Without SPT_NOENV, setproctitle (Ray, SGLang) overwrites the environment, and with it the mark.
        own = {**environment(), MARK: self.mark, "SPT_NOENV": "1", "RAY_TMPDIR": str(self._ray_directory)}
        # Ray must not kill processes when memory runs low.
        own["RAY_memory_monitor_refresh_ms"] = "0"
        self._is_hung_up = threading.Event()
        self._screen: threading.Thread | None = None
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
        self._size = 0
        self._records: list[dict[str, Any]] = []

    @property
    def pid(self) -> int:
        """Process id of the driver, and of its process group."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """The driver's exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def processes(self) -> list[Process]:
        """The live processes of this start; `known` keeps all that were ever seen."""
        processes = marked(self.mark, self.pid)
        self.known.update({process.pid: process for process in processes})
        return processes

    def note_descendants(self) -> None:
        """Add to `known` descendants of the driver that were started with another environment, without the mark."""
        for process in descendants(self.pid):
            self.known.setdefault(process.pid, process)

    def left(self) -> list[Process]:
        """All live processes of this start, including the driver."""
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
        """The output from byte offset `start` on, without terminal colours."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.log.read_bytes()[start:].decode(errors="replace"))

    def hang_up(self) -> None:
        """Close the terminal of the run."""
        self._is_hung_up.set()
        if self._screen is not None:
            self._screen.join()

    def wait(self, condition: Callable[[], bool], limit_s: float | None = None, poll_s: float = _POLL_S) -> None:
        """Return as soon as `condition` holds.

        Raises Ended if the driver ends first, Stuck after `limit_s` seconds (default: PROGRESS_LIMIT_S).
        """
        limit_s = PROGRESS_LIMIT_S if limit_s is None else limit_s
        deadline = time.monotonic() + limit_s
        while True:
            # In this order, so that the last thing that the driver did counts.
            has_ended = self.exit_code() is not None
            if condition():
                return
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
        """Kill all processes that are left. Raises RuntimeError if one does not end."""
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
        """Copy the terminal's output to the log until `hang_up`."""
        with self.log.open("ab", buffering=0) as log:
            while not self._is_hung_up.is_set():
                if select.select([ours], [], [], _POLL_S)[0]:
                    log.write(os.read(ours, 65536))
        # Not in hang_up: a descriptor that another thread reads stays open until that read returns.
        os.close(ours)
        os.close(theirs)


def read_records(save: Path) -> list[dict[str, Any]]:
    """The metrics of all training steps of all starts, without a line that is still being written."""
    path = metrics_file(save)
    content = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = content[: content.rfind("\n") + 1].splitlines()
    return [record for record in map(json.loads, lines) if "train/loss" in record]


def metrics_file(save: Path) -> Path:
    """The metrics file of a run without --run-dir."""
    return save / "run" / "metrics.jsonl"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def saved_step(save: Path) -> int:
    """The step of the last checkpoint; 0 if there is none."""
    tracker = save / _TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0


def moments(attempt: Attempt, trial: Trial) -> Iterator[None]:
    """Wait for the moments that suit a trial, and yield at each.

    Ends when this start can have no more of them; raises Ended or Stuck like `Attempt.wait`.
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
        # A partial directory of an earlier start does not count; it is removed when the next save begins.
        begun = len(attempt.steps())
        attempt.wait(partial(_ends_with_save, attempt, begun + 1))
        attempt.wait(lambda: any(attempt.save.glob("*.partial")))
        time.sleep(0.3 * trial.fraction)
        deadline = time.monotonic() + 2
        yield
        while any(attempt.save.glob("*.partial")) and time.monotonic() < deadline:
            yield


def _in_step(attempt: Attempt, trial: Trial) -> Iterator[None]:
    """Aim by the durations of the previous step, whose phases take about as long in the next one."""
    num_steps = max(trial.after, 1) + len(attempt.steps())
    while True:
        # Not after a saved step: the next one begins later.
        attempt.wait(partial(_ends_without_save, attempt, num_steps))
        last = attempt.records()[-1]
        time.sleep(delay_in_step(trial.phase, trial.fraction, last))
        yield
        num_steps = len(attempt.steps()) + 1


def _ends_with_save(attempt: Attempt, num_steps: int) -> bool:
    """Whether at least `num_steps` steps are logged and the last of them is followed by a save."""
    return len(attempt.steps()) >= num_steps and attempt.steps()[-1] % SAVE_INTERVAL == 0


def _ends_without_save(attempt: Attempt, num_steps: int) -> bool:
    return len(attempt.steps()) >= num_steps and attempt.steps()[-1] % SAVE_INTERVAL != 0


def delay_in_step(phase: Phase, fraction: float, last: dict[str, Any]) -> float:
    """Seconds from the end of a step, whose metrics are `last`, to `fraction` of a phase of the next one."""
    parts = ((Phase.UPDATE_WEIGHTS, "update_weights"), (Phase.GENERATE, "rollout"), (Phase.TRAIN, "train"))
    delay = 0.0
    for part, name in parts:
        seconds = last.get(f"perf/{name}_time", 0.0)
        if part is phase:
            return delay + fraction * seconds
        delay += seconds
    raise ValueError(f"{phase} is not a phase of a step")
