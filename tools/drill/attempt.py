"""One start of a run's command: its processes, its output, its metrics, and the moments for kills."""

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

# Seconds without progress after which a run counts as stuck, on a busy machine.
PROGRESS_LIMIT_S = 300
_CLOSE_LIMIT_S = 60
_POLL_S = 0.01
# A kill during start-up comes up to this many seconds after a process has appeared.
_START_SPREAD_S = 3.0
_TERMINAL = Path(__file__).with_name("terminal.py")
_TRACKER = "latest_checkpointed_iteration.txt"


class Ended(Exception):
    """The driver has ended while the drill waited for something else."""


class Stuck(Exception):
    """The event that the drill waited for has not happened within its time limit."""


class Attempt:
    """A running command that writes checkpoints to `save` and metrics to `save`/run."""

    def __init__(self, command: Sequence[str], save: Path, log: Path, *, in_terminal: bool = False) -> None:
        self.mark = secrets.token_hex(8)
        self.save, self.log = save, log
        self.saved_before = saved_step(save)
        self._begun = time.time()
        # Not below the work directory: paths of Ray's sockets have at most 107 bytes.
        self._ray_directory = Path(tempfile.mkdtemp(prefix="drill_", dir="/tmp"))
        # SPT_NOENV: setproctitle, which Ray and SGLang call, would overwrite the environment, and so the mark.
        variables = {**environment(), MARK: self.mark, "SPT_NOENV": "1", "RAY_TMPDIR": str(self._ray_directory)}
        # Ray must not kill processes when memory is low.
        variables["RAY_memory_monitor_refresh_ms"] = "0"
        self._is_hung_up = threading.Event()
        self._screen: threading.Thread | None = None
        if in_terminal:
            self._process = self._start_in_terminal(command, variables)
        else:
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=variables,
                    start_new_session=True,
                )
        self.known: dict[int, Process] = {}
        self._size = 0
        self._records: list[dict[str, Any]] = []

    @property
    def pid(self) -> int:
        """Process id of the driver, which is also the id of its process group."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """The driver's exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def processes(self) -> list[Process]:
        """The living processes of this start; `known` collects all that have been seen."""
        living = marked(self.mark, self.pid)
        self.known.update({process.pid: process for process in living})
        return living

    def note_descendants(self) -> None:
        """Add the driver's descendants to `known`, including those without the mark in their environment."""
        for process in descendants(self.pid):
            self.known.setdefault(process.pid, process)

    def left(self) -> list[Process]:
        """The known processes of this start that are still alive, the driver included."""
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
        """Its output from an offset in bytes, without terminal colours."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.log.read_bytes()[start:].decode(errors="replace"))

    def hang_up(self) -> None:
        """Close its terminal."""
        self._is_hung_up.set()
        if self._screen is not None:
            self._screen.join()

    def wait(self, condition: Callable[[], bool], limit_s: float | None = None, poll_s: float = _POLL_S) -> None:
        """Poll `condition` until it holds.

        Raises Ended if the driver ends first, Stuck after `limit_s` seconds (None: PROGRESS_LIMIT_S).
        """
        limit_s = PROGRESS_LIMIT_S if limit_s is None else limit_s
        deadline = time.monotonic() + limit_s
        while True:
            # In this order, so that the driver's last action is not missed.
            has_ended = self.exit_code() is not None
            if condition():
                return
            if has_ended:
                raise Ended(f"exit code {self.exit_code()}")
            if time.monotonic() > deadline:
                raise Stuck(f"no progress for {limit_s:g} s")
            time.sleep(poll_s)

    def wait_end(self, limit_s: float) -> int | None:
        """The driver's exit code; None if it still runs after `limit_s` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(limit_s)
        return None

    def close(self) -> None:
        """Kill the processes that are left. Raises RuntimeError if they do not end."""
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

    def _start_in_terminal(self, command: Sequence[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
        master, slave = os.openpty()
        argv = [sys.executable, "-S", str(_TERMINAL), os.ttyname(slave), *command]
        process = subprocess.Popen(argv, env=variables, start_new_session=True)
        self.log.write_bytes(b"")
        self._screen = threading.Thread(target=self._copy_output, args=(master, slave), daemon=True)
        self._screen.start()
        return process

    def _copy_output(self, master: int, slave: int) -> None:
        """Copy the output of the terminal to the log until `hang_up`, then close the terminal."""
        with self.log.open("ab", buffering=0) as log:
            while not self._is_hung_up.is_set():
                if select.select([master], [], [], _POLL_S)[0]:
                    log.write(os.read(master, 65536))
        # Not in hang_up: closing a descriptor takes effect only after another thread's read has returned.
        os.close(master)
        os.close(slave)


def read_records(save: Path) -> list[dict[str, Any]]:
    """The metrics of the training steps of all starts; an incomplete last line is skipped."""
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
    """The step of the last checkpoint; 0 without a checkpoint."""
    tracker = save / _TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0


def moments(attempt: Attempt, trial: Trial) -> Iterator[None]:
    """Wait for the moments that fit a trial, and yield at each of them.

    Returns when this start can have no more of them. Raises Ended or Stuck as `Attempt.wait` does.
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
        # Wait for a step first: a partial save of an earlier start is removed only when the next save begins.
        num_steps = len(attempt.steps())
        attempt.wait(partial(_has_step, attempt, num_steps + 1, is_saved=True))
        attempt.wait(lambda: any(attempt.save.glob("*.partial")))
        time.sleep(0.3 * trial.fraction)
        deadline = time.monotonic() + 2
        yield
        while any(attempt.save.glob("*.partial")) and time.monotonic() < deadline:
            yield


def _in_step(attempt: Attempt, trial: Trial) -> Iterator[None]:
    """Predict the moment from the durations of the previous step, whose phases take about as long."""
    num_steps = max(trial.after, 1) + len(attempt.steps())
    while True:
        # Not after a step that is saved: the save delays the next step.
        attempt.wait(partial(_has_step, attempt, num_steps, is_saved=False))
        last = attempt.records()[-1]
        time.sleep(delay_in_step(trial.phase, trial.fraction, last))
        yield
        num_steps = len(attempt.steps()) + 1


def _has_step(attempt: Attempt, num_steps: int, *, is_saved: bool) -> bool:
    """Whether at least `num_steps` steps are logged, and a save follows the last one or (`is_saved` False) does not."""
    steps = attempt.steps()
    return len(steps) >= num_steps and (steps[-1] % SAVE_INTERVAL == 0) is is_saved


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
