"""A run's teacher from start to end: probed, checked again beside the rollouts, measured, and closed."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from slime_opd.metrics import Mean, Metric, Replicated
from slime_opd.observe import console
from slime_opd.teacher.recheck import TeacherRecheck
from slime_opd.teacher.teacher import Teacher
from slime_opd.types import Sample


class Loop(Protocol):
    """The event loop that the teacher's connections belong to."""

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any: ...

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]: ...


class TeacherSession:
    """A teacher and the check that it stays the same, for a driver that is not async."""

    def __init__(self, teacher: Teacher, loop: Loop, check_interval: int) -> None:
        """`check_interval`: rollouts between two checks, 0: never."""
        self.teacher = teacher
        self._loop, self._check_interval = loop, check_interval
        self._recheck: TeacherRecheck | None = None
        self._num_bytes = 0

    def start(self, tokenizer: Any, student_checkpoint: str, saved_state: Mapping[str, Any] | None) -> None:
        """Probe the teacher and print what it is; compare it with that of a resumed checkpoint's `state`, if any.

        Raises TeacherError for a teacher that cannot teach the student, or is another one than the checkpoint's.
        """
        report = self._loop.run(self.teacher.probe(tokenizer, student_checkpoint))
        console.say(str(report))
        self._recheck = TeacherRecheck(self.teacher, report.fingerprint, self._check_interval, self._loop.submit)
        self._loop.run(self._recheck.compare_saved(saved_state))

    def begin_rollout(self, step: int) -> None:
        """Call before the rollout of `step` (from 0): starts a check that is due."""
        self._recheck.begin(step)
        self._num_bytes = self.teacher.num_bytes

    def end_rollout(self, samples: Sequence[Sample]) -> dict[str, Metric]:
        """The teacher's metrics of a rollout. Raises TeacherError where a check found another teacher."""
        num_tokens = sum(sample.response_length for sample in samples)
        num_bytes = self.teacher.num_bytes - self._num_bytes
        metrics: dict[str, Metric] = {"perf/teacher_bytes_per_token": Mean(num_bytes, num_tokens)}
        self._recheck.finish()
        if self._recheck.drift is not None:
            metrics["opd/teacher_drift"] = Replicated(self._recheck.drift)
        return metrics

    def state(self) -> dict[str, Any] | None:
        """The teacher's fingerprint as JSON values, for a checkpoint's run state; None where none could be taken."""
        return self._recheck.state()

    def close(self) -> None:
        """Cancel a check that is still running, and close the connections."""
        if self._recheck is not None:
            self._recheck.close()
        self._loop.run(self.teacher.aclose())
