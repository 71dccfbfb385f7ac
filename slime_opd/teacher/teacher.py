"""The teacher that scores a rollout's responses: its interface, and the table of kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from slime_opd.config import Config
from slime_opd.engine.client import EngineClient
from slime_opd.errors import EngineError
from slime_opd.teacher.fingerprint import Reading
from slime_opd.teacher.probe import ProbeReport
from slime_opd.teacher.sglang import make_sglang_teacher
from slime_opd.types import Sample, TeacherScores


class Teacher(Protocol):
    """Scores responses during the rollout. What its kind can do is in `config.teacher_kinds`.

    A failure to score is part of the result and no exception; `latest_failure` is the reason of the last one.
    """

    latest_failure: str | None

    @property
    def url(self) -> str:
        """Its address, for messages: without user and password."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all requests and answers so far."""

    async def probe(self, tokenizer: Any, student_checkpoint: str | Path) -> ProbeReport:
        """Start it, or reach it, and check that it can teach the student. Raises TeacherError where it cannot."""

    async def score(self, sample: Sample) -> TeacherScores:
        """Its log-probs of the response's tokens."""

    def failed_scores(self, sample: Sample, error: EngineError) -> TeacherScores:
        """The scores of a response that it failed to give: NaN. Counts the failure."""

    async def read(self, sequences: Sequence[Sequence[int]], start: int) -> Reading:
        """Its log-probs of fixed sequences from token `start` on. Raises EngineError where it does not answer."""

    def note_failure(self, error: EngineError) -> None:
        """Count a failure, and log the first of its kind."""

    def generation_client(self) -> EngineClient:
        """A client that generates with its model; the caller closes it. For kinds that can generate."""

    async def aclose(self) -> None:
        """Close the connections."""


# By --opd-type. None: the trainer loads the teacher, and scores in its own forward passes.
TEACHERS: Mapping[str, Callable[[Config], Teacher] | None] = {
    "sglang": make_sglang_teacher,
    "megatron": None,
}


def make_teacher(config: Config) -> Teacher | None:
    """The teacher that scores this run's rollouts; None without one, and for rollouts that are replayed."""
    make = TEACHERS.get(config.opd.opd_type) if config.opd.use_opd and config.generates else None
    return None if make is None else make(config)
