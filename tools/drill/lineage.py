"""One run with several kills: the same command is started again after each kill, until it finishes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from drill.attempt import PROGRESS_LIMIT_S, Attempt, Ended, Stuck, moments, read_records, saved_step
from drill.judge import problems_of
from drill.kinds import Kind, Outcome, Phase, Role, Way
from drill.plan import Trial
from drill.processes import Process, shared_memory
from drill.results import FINISHED, Result
from drill.stacks import Material, command, rollouts
from drill.steps import check_start, indistinct, missing
from drill.weights import differing_tensors

# A run with fewer steps left gets no further kills, since a kill needs steps before and after it.
_MIN_STEPS_LEFT = 9
_MAX_TRIES = 3


@dataclass(frozen=True)
class Setting:
    """The settings that all runs of a drill share. `references`: final checkpoints of uninterrupted runs, by stack."""

    directory: Path
    material: Material
    teacher_url: str | None
    references: Mapping[str, Path]
    say: Callable[[str], None]
    hang_limit_s: float = 90.0
    clean_limit_s: float = 10.0
    stop_s: float = 20.0
    is_interrupted: threading.Event = field(default_factory=threading.Event)


class Interrupted(Exception):
    """The drill itself has been interrupted."""


class Lineage:
    """All starts of one command. `run` does kills from a queue, and then lets the run finish."""

    def __init__(self, setting: Setting, stack: str, name: str) -> None:
        self.results: list[Result] = []
        # Problems of the whole run; some are also recorded in the result of a kill.
        self.problems: list[str] = []
        self._is_broken = False
        self._setting, self._stack, self.name = setting, stack, name
        self._directory = setting.directory / name
        self._directory.mkdir(parents=True)
        self.save = self._directory / "save"
        self._command = command(stack, setting.material, self.save, setting.teacher_url)
        self._attempt: Attempt | None = None
        self._starts = 0
        # Kills since which no start has logged a step; problems with the next start's steps are attributed to them.
        self._unsettled: list[Result] = []
        # Kills that the current start has survived.
        self._survived: list[Result] = []

    def run(self, queue: deque[Trial]) -> None:
        """Do as many kills of the queue as fit, then let the run finish. A kill that could not be done is requeued."""
        try:
            while not self._is_broken and self._has_steps_left() and (trial := self._take(queue)) is not None:
                if not self._do(trial):
                    self._put_back(trial, queue)
            if not self._is_broken:
                self._finish()
        finally:
            if self._attempt is not None:
                self._attempt.close()

    def _has_steps_left(self) -> bool:
        left = rollouts(self._stack) - max([saved_step(self.save), *(self._attempt.steps() if self._attempt else [])])
        return left >= _MIN_STEPS_LEFT

    def _take(self, queue: deque[Trial]) -> Trial | None:
        """Take the next possible kill off the queue: a run that survived one is past its start, without a terminal."""
        if any(result.kind == "warden-kill" for result in self._survived):
            # Without its warden a run cannot clean up after a second kill: that would be two faults at the same time.
            return None
        for trial in queue:
            if self._attempt is None or (trial.phase is not Phase.START and not trial.kind.is_in_terminal):
                queue.remove(trial)
                return trial
        return None

    def _put_back(self, trial: Trial, queue: deque[Trial]) -> None:
        if trial.tries + 1 < _MAX_TRIES:
            queue.append(trial.again())
            return
        result = _result_of(trial)
        result.problems.append(f"not done after {_MAX_TRIES} tries: no {trial.kind.role.value} at the chosen moments")
        self.results.append(result)
        self._say(result)

    def _do(self, trial: Trial) -> bool:
        """Do one kill and watch its outcome; returns whether it could be done."""
        attempt = self._attempt or self._start(in_terminal=trial.kind.is_in_terminal)
        try:
            target = self._aim(attempt, trial)
        except (Ended, Stuck) as reason:
            if attempt.exit_code() == 0:
                return False
            self._break(attempt, f"the same command did not resume: {reason}")
            return False
        if target is None:
            return False
        result = _result_of(trial)
        self.results.append(result)
        log_size = attempt.log.stat().st_size
        attempt.note_descendants()
        segments = shared_memory(attempt.known.values())
        begun = time.monotonic()
        self._attack(attempt, target, trial.kind)
        self._watch(attempt, trial.kind, result)
        result.seconds_to_end = time.monotonic() - begun
        has_survived = result.code is None and not result.hung
        if not has_survived:
            self._look_at_what_is_left(attempt, result, segments)
        output = attempt.output(log_size)
        result.output_lines = output.count("\n")
        result.problems += problems_of(result, trial.kind, output, self._setting.clean_limit_s)
        if has_survived:
            self._survived.append(result)
        else:
            self._settle(attempt)
            self._unsettled.append(result)
        return True

    def kill(self) -> None:
        """Kill the run, from another thread."""
        if self._attempt is not None:
            self._attempt.close()

    def _start(self, in_terminal: bool = False) -> Attempt:
        if self._setting.is_interrupted.is_set():
            raise Interrupted
        self._starts += 1
        log = self._directory / f"start_{self._starts}.log"
        self._attempt = Attempt(self._command, self.save, log, in_terminal=in_terminal)
        return self._attempt

    def _aim(self, attempt: Attempt, trial: Trial) -> Process | None:
        """Wait for a moment that fits the trial; returns the process to kill, None if there is no such moment left."""
        for _ in moments(attempt, trial):
            targets = [process for process in attempt.processes() if process.role is trial.kind.role]
            if targets:
                targets.sort(key=lambda process: process.pid)
                return targets[int(trial.fraction * 1000) % len(targets)]
        return None

    def _attack(self, attempt: Attempt, target: Process, kind: Kind) -> None:
        if kind.way is Way.HANG_UP:
            attempt.hang_up()
        elif kind.way is Way.GROUP:
            _kill_group(attempt.pid, kind.signal)
        else:
            target.send(kind.signal)
        if kind.way is Way.STOP:
            attempt.wait_end(self._setting.stop_s)
            target.send(signal.SIGCONT)

    def _watch(self, attempt: Attempt, kind: Kind, result: Result) -> None:
        """Wait until the run has ended or, if it may survive, has done two more steps."""
        done = len(attempt.steps())
        limit = self._setting.hang_limit_s
        if kind.outcome is Outcome.ENDS:
            result.code = attempt.wait_end(limit)
            result.hung = result.code is None
            return
        try:
            attempt.wait(lambda: len(attempt.steps()) >= done + 2, limit)
        except Ended:
            # A run with few steps left survives by finishing.
            result.code = attempt.exit_code() or None
        except Stuck:
            result.hung = True

    def _look_at_what_is_left(self, attempt: Attempt, result: Result, segments: set[Path]) -> None:
        """Wait for all processes to end, up to the limit; then kill those left, which would disturb the next start."""
        begun = time.monotonic()
        if not result.hung:
            while (left := attempt.left()) and time.monotonic() - begun < self._setting.clean_limit_s:
                time.sleep(0.05)
            result.left = [str(process) for process in left]
            result.seconds_to_clean = None if left else time.monotonic() - begun
            own = shared_memory(attempt.known.values()) | segments
            result.shared_memory = sorted(path.name for path in own if path.exists())
        attempt.close()
        for path in shared_memory(attempt.known.values()) | segments:
            path.unlink(missing_ok=True)

    def _settle(self, attempt: Attempt) -> None:
        """Check the steps of the start that has ended, against what came before it."""
        self._attempt = None
        steps = attempt.steps()
        if not steps:
            return
        check = check_start(steps, attempt.saved_before)
        problems = []
        if check.lost or check.doubled:
            problems.append(
                f"the start after it found a checkpoint of step {attempt.saved_before} and did steps {steps[0]} to "
                f"{steps[-1]}: {len(check.lost)} lost, {len(check.doubled)} doubled"
            )
        if attempt.saved_before and "resum" not in attempt.output():
            problems.append("the start after it did not print that it resumed")
        ended, survived = self._unsettled, self._survived
        self._unsettled, self._survived = [], []
        # The kill before this start; without one, the last kill that it has survived.
        blamed = (ended or survived)[-1:]
        for result in blamed:
            result.lost, result.doubled = list(check.lost), list(check.doubled)
            result.problems += problems
        if not blamed:
            self.problems += problems
        for result in ended + survived:
            result.steps_known = True
            self._say(result)

    def _finish(self) -> None:
        """Let the run finish, then check all its steps and its final weights."""
        attempt = self._attempt or self._start()
        try:
            attempt.wait(lambda: bool(attempt.steps()) or attempt.exit_code() is not None)
        except Stuck as reason:
            self._break(attempt, f"the same command did not resume: {reason}")
            return
        attempt.processes()
        attempt.note_descendants()
        segments = shared_memory(attempt.known.values())
        code = attempt.wait_end(PROGRESS_LIMIT_S)
        if code != 0:
            self._break(
                attempt, "the same command did not finish: " + ("it hangs" if code is None else f"exit code {code}")
            )
            return
        result = Result(0, FINISHED, self._stack, "end", code)
        self._look_at_what_is_left(attempt, result, segments)
        result.problems += problems_of(result, _NO_KILL, "", self._setting.clean_limit_s)
        self._settle(attempt)
        records = read_records(self.save)
        if repeated := indistinct(records):
            result.problems.append(f"metrics.jsonl has several records of one attempt for steps {list(repeated)}")
        result.lost = list(missing([record["step"] for record in records], rollouts(self._stack)))
        if result.lost:
            result.problems.append(f"no metrics of steps {result.lost}")
        self.results.append(result)
        if self._stack in self._setting.references:
            self._compare()
        self._say(result)

    def _compare(self) -> None:
        differing = differing_tensors(self._setting.references[self._stack], self.final_checkpoint())
        for result in self.results:
            result.bit_equal = not differing
            if differing:
                result.problems.append(f"{len(differing)} tensors differ at the end, first {differing[0]}")

    def final_checkpoint(self) -> Path:
        """Directory of the last checkpoint."""
        return self.save / f"iter_{saved_step(self.save):07d}"

    def _break(self, attempt: Attempt, reason: str) -> None:
        """Abandon a run that has not recovered from its last kill."""
        self._attempt = None
        attempt.close()
        lines = attempt.output().strip().splitlines()
        self._is_broken = True
        self.problems.append(f"{reason}; {attempt.log} ends with {lines[-1][:200] if lines else 'nothing'!r}")
        for result in self._unsettled + self._survived:
            result.problems.append(self.problems[-1])
            self._say(result)
        self._unsettled, self._survived = [], []

    def _say(self, result: Result) -> None:
        self._setting.say(f"{self.name}: {result.line()}")


_NO_KILL = Kind("none", Role.DRIVER, codes=(0,), sentence="")


def _result_of(trial: Trial) -> Result:
    return Result(trial.number, trial.kind.name, trial.stack, trial.phase.value)


def _kill_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
