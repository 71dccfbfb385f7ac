"""During the run: is the teacher still the one that the run started with?"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any

from slime_opd.errors import EngineError, TeacherError
from slime_opd.teacher.fingerprint import Fingerprint, distance, read
from slime_opd.teacher.sglang import SGLangTeacher

_SAME_TEACHER = "Start the run's teacher again and continue from the last checkpoint"


class TeacherRecheck:
    """Takes the teacher's fingerprint again every `interval` rollouts (0: never), beside the rollout and not before it.

    `submit` starts a coroutine on the loop that the teacher's client belongs to. A reading that fails is a counted failure
    of the teacher, not a change. `drift`: the distance of the latest reading, in nats, None before the first.
    """

    def __init__(
        self,
        teacher: SGLangTeacher,
        fingerprint: Fingerprint | None,
        interval: int,
        submit: Callable[[Coroutine[Any, Any, None]], Future[None]],
    ) -> None:
        self._teacher, self._fingerprint, self._interval, self._submit = teacher, fingerprint, interval, submit
        self._reading: Future[None] | None = None
        self.drift: float | None = None

    def begin(self, rollout: int) -> None:
        """Ask, if it is the turn of this rollout (counted from 0, which the start has just looked at)."""
        due = self._interval and rollout and rollout % self._interval == 0
        if due and self._fingerprint is not None and self._reading is None:
            self._reading = self._submit(self._compare(self._fingerprint, "at the start of this run"))

    def finish(self) -> None:
        """Raise TeacherError where the teacher has changed. An answer that is still out is looked at the next time."""
        if self._reading is not None and self._reading.done():
            reading, self._reading = self._reading, None
            reading.result()

    def close(self) -> None:
        """Cancel a reading that is still out."""
        if self._reading is not None:
            self._reading.cancel()

    async def compare_saved(self, saved: Mapping[str, Any] | None) -> None:
        """Compare with the fingerprint that a checkpoint's run state has, if any. Raises TeacherError where it is another teacher's."""
        if saved is not None and self._interval:
            await self._compare(Fingerprint.from_json(saved), "when the checkpoint was saved")

    def state(self) -> dict[str, Any] | None:
        """The fingerprint as JSON values, for a checkpoint's run state."""
        return None if self._fingerprint is None else self._fingerprint.to_json()

    async def _compare(self, fingerprint: Fingerprint, when: str) -> None:
        try:
            self.drift = await self._read(fingerprint)
            if self.drift > fingerprint.tolerance:  # twice, before a run of days is stopped
                self.drift = min(self.drift, await self._read(fingerprint))
        except EngineError as error:
            self._teacher.note(error)
            return
        if self.drift > fingerprint.tolerance:
            raise TeacherError(
                f"the teacher at {self._teacher.client.url} is not the one it was {when}: its log-probs of fixed sequences differ by {self.drift:.2g} nats, "
                f"more than {fingerprint.tolerance:.2g} (what they varied by, idle and busy, was {fingerprint.spread:.2g}). Was another model started there, or other weights or "
                f"another precision? {_SAME_TEACHER}, or accept the change with --opd-teacher-check-interval 0"
            )

    async def _read(self, fingerprint: Fingerprint) -> float:
        return distance(
            await read(self._teacher.client, fingerprint.sequences, fingerprint.start), fingerprint.log_probs
        )
