"""Checks during the run that the teacher is still the model that the run started with."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any

from slime_opd.errors import EngineError, TeacherError
from slime_opd.teacher.fingerprint import Fingerprint, distance
from slime_opd.teacher.teacher import Teacher

_SAME_TEACHER = "Start the run's teacher again and continue from the last checkpoint"


class TeacherRecheck:
    """Reads the teacher's fingerprint again every `interval` rollouts (0: never), at the same time as the rollout.

    `submit` starts a coroutine on the event loop that the teacher's connections belong to. A reading that fails is a
    counted failure of the teacher, not a change. `drift`: distance of the latest reading in nats; None before it.
    """

    def __init__(
        self,
        teacher: Teacher,
        fingerprint: Fingerprint | None,
        interval: int,
        submit: Callable[[Coroutine[Any, Any, None]], Future[None]],
    ) -> None:
        self._teacher, self._fingerprint, self._interval, self._submit = teacher, fingerprint, interval, submit
        self._reading: Future[None] | None = None
        self.drift: float | None = None

    def begin(self, rollout: int) -> None:
        """Start a reading if one is due at `rollout`, counted from 0; at 0 the start has just taken one."""
        due = self._interval and rollout and rollout % self._interval == 0
        if due and self._fingerprint is not None and self._reading is None:
            self._reading = self._submit(self._compare(self._fingerprint, "at the start of this run"))

    def finish(self) -> None:
        """Raise TeacherError where the teacher has changed. A reading that still runs is left to the next call."""
        if self._reading is not None and self._reading.done():
            reading, self._reading = self._reading, None
            reading.result()

    def close(self) -> None:
        """Cancel a reading that is still running."""
        if self._reading is not None:
            self._reading.cancel()

    async def compare_saved(self, saved: Mapping[str, Any] | None) -> None:
        """Compare with the fingerprint `saved` in a checkpoint, if any. Raises TeacherError for another teacher's."""
        if saved is not None and self._interval:
            await self._compare(Fingerprint.from_json(saved), "when the checkpoint was saved")

    def state(self) -> dict[str, Any] | None:
        """The fingerprint as JSON values, for a checkpoint's run state."""
        return None if self._fingerprint is None else self._fingerprint.to_json()

    async def _compare(self, fingerprint: Fingerprint, when: str) -> None:
        try:
            self.drift = await self._read(fingerprint)
            if self.drift > fingerprint.tolerance:  # a second reading, before a run of days is stopped
                self.drift = min(self.drift, await self._read(fingerprint))
        except EngineError as error:
            self._teacher.note_failure(error)
            return
        if self.drift > fingerprint.tolerance:
            raise TeacherError(
                f"the teacher at {self._teacher.url} is not the one it was {when}: its log-probs of fixed sequences differ by {self.drift:.2g} nats, "
                f"more than {fingerprint.tolerance:.2g} (what they varied by, idle and busy, was {fingerprint.spread:.2g}). Was another model started there, or other weights or "
                f"another precision? {_SAME_TEACHER}, or accept the change with --opd-teacher-check-interval 0"
            )

    async def _read(self, fingerprint: Fingerprint) -> float:
        return distance(await self._teacher.read(fingerprint.sequences, fingerprint.start), fingerprint.log_probs)
