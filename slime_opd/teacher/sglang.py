"""A teacher behind an SGLang server, which scores each response while others are still generated."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import Protocol

import numpy as np

from slime_opd.config import Config
from slime_opd.engine.client import EngineClient
from slime_opd.errors import ConfigError, EngineError, EngineTimeout
from slime_opd.types import Sample, TeacherScores

logger = logging.getLogger(__name__)


class Teacher(Protocol):
    """Scores responses with a teacher model."""

    async def score(self, sample: Sample) -> TeacherScores:
        """The teacher's log-probs of the response's tokens. A failure is in the scores, not raised."""


class SGLangTeacher:
    """Scores with one SGLang server, at temperature 1.

    What cannot be had, or comes back about other tokens, as a number that is not finite or at a wrong length, is
    a failure: NaN with its reason. Each kind of failure is logged once and counted in `failures`.
    """

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.failures: Counter[str] = Counter()

    async def score(self, sample: Sample) -> TeacherScores:
        """The teacher's log-probs of the response's tokens; an empty response needs no request."""
        if not sample.response_length:
            return TeacherScores(np.empty(0, dtype=np.float32))
        try:
            return TeacherScores(await self.client.score(sample.tokens, len(sample.prompt.tokens)))
        except EngineError as error:
            self._note(error)
            return TeacherScores.missing(sample.response_length, str(error))

    def _note(self, error: EngineError) -> None:
        kind = _kind(error)
        self.failures[kind] += 1
        if self.failures[kind] == 1:
            logger.warning(
                "the teacher did not score a response; more failures of this kind (%s) are counted, not logged: %s",
                kind,
                error,
            )


def teacher_client(config: Config) -> EngineClient:
    """The client of the server at --rm-url. Raises ConfigError where that is not set."""
    if not config.reward.rm_url:
        raise ConfigError(
            "--opd-type sglang needs --rm-url, the address of the teacher's SGLang server, such as http://HOST:PORT/generate"
        )
    return EngineClient(
        config.reward.rm_url.rstrip("/").removesuffix("/generate"),
        concurrency=config.opd.opd_teacher_concurrency,
        timeout_s=config.opd.opd_teacher_timeout_s,
        retries=config.opd.opd_teacher_retries,
    )


def make_teacher(config: Config) -> SGLangTeacher:
    """The teacher of a run with `--opd-type sglang`."""
    return SGLangTeacher(teacher_client(config))


def _kind(error: EngineError) -> str:
    """Failures whose messages differ in numbers alone are of one kind."""
    return "timeout" if isinstance(error, EngineTimeout) else re.sub(r"\d+", "N", str(error))[:120]
