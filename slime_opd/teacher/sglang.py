"""A teacher behind an SGLang server, which scores each response while others are still generated."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from slime_opd.config import Config
from slime_opd.engine.client import EngineClient
from slime_opd.errors import ConfigError, EngineError, EngineTimeout
from slime_opd.teacher.facts import student_facts
from slime_opd.types import Sample, TeacherScores

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "SLIME_OPD_TEACHER_API_KEY"


@dataclass(frozen=True)
class Wanted:
    """What a teacher is asked for beside the sampled tokens: its own top-k, and its scores of the student's.

    vocabulary: its number of ids; a server that is asked for more of them ends. dtype: of the log-probs that are kept.
    """

    top_k: int = 0
    student_top_k: int = 0
    vocabulary: int = 1 << 30
    dtype: type[np.floating] = np.float32

    @property
    def asked(self) -> int:
        """Tokens of its own top-k that hold what is wanted; of the student's top-k nearly all are in twice as many."""
        return min(max(self.top_k, 2 * self.student_top_k), self.vocabulary)

    def missing(self, length: int, failure: str | None) -> TeacherScores:
        """Scores of `length` tokens that are not there, of the same shapes as those that are."""
        of_width = lambda k: np.full((length, k), np.nan, self.dtype) if k else None  # noqa: E731
        return TeacherScores(
            np.full(length, np.nan, np.float32),
            failure,
            np.zeros((length, self.top_k), np.int32) if self.top_k else None,
            of_width(self.top_k),
            of_width(self.student_top_k),
        )


class SGLangTeacher:
    """Scores with one SGLang server, at temperature 1.

    What cannot be had, or comes back about other tokens, as a number that is not finite or at a wrong length, is
    a failure: NaN with its reason. Each kind of failure is logged once and counted in `failures`.
    """

    def __init__(self, client: EngineClient, wanted: Wanted | None = None) -> None:
        self.client = client
        self.failures: Counter[str] = Counter()
        self.latest_failure: str | None = None
        self.wanted = wanted or Wanted()

    async def score(self, sample: Sample) -> TeacherScores:
        """The teacher's log-probs of the response's tokens, and of top-k ones; an empty response needs no request."""
        if not sample.response_length:
            return self.wanted.missing(0, None)
        try:
            return await self._scored(sample)
        except EngineError as error:
            return self.failed(sample, error)

    def failed(self, sample: Sample, error: EngineError) -> TeacherScores:
        """The scores of a response that there are none of."""
        self.note(error)
        return self.wanted.missing(sample.response_length, str(error))

    async def _scored(self, sample: Sample) -> TeacherScores:
        wanted, tokens, start = self.wanted, sample.tokens, len(sample.prompt.tokens)
        if not wanted.asked:
            return TeacherScores(await self.client.score(tokens, start))
        log_probs, top = await self.client.score_top_k(tokens, start, wanted.asked)
        scores = TeacherScores(log_probs)
        if wanted.top_k:
            # A copy: a slice would keep all that was asked for.
            ids, of_ids = top.ids[:, : wanted.top_k].copy(), top.log_probs[:, : wanted.top_k].astype(wanted.dtype)
            scores = replace(scores, top_ids=ids, top_log_probs=of_ids)
        if wanted.student_top_k:
            candidates = sample.values["student_top_ids"]
            of_student = await self.client.score_candidates(tokens, start, candidates, top)
            scores = replace(scores, student_log_probs=of_student.astype(wanted.dtype))
        return scores

    def note(self, error: EngineError) -> None:
        """Count a failure, and log the first of its kind."""
        self.latest_failure = str(error)
        kind = _kind(error)
        self.failures[kind] += 1
        if self.failures[kind] == 1:
            logger.warning(
                "the teacher did not score a response; more failures of this kind (%s) are counted, not logged: %s",
                kind,
                error,
            )


def teacher_url(config: Config) -> str:
    """The address of the teacher's server. Raises ConfigError where --rm-url is not set."""
    if not config.reward.rm_url:
        raise ConfigError(
            "--opd-type sglang needs --rm-url, the address of the teacher's SGLang server, such as http://HOST:PORT/generate"
        )
    return config.reward.rm_url.rstrip("/").removesuffix("/generate")


def teacher_client(config: Config, timeout_s: float | None = None) -> EngineClient:
    """A client of the server at --rm-url, by default with the time limits of a score; with `timeout_s` that alone.

    A key comes from the environment, as a flag's value would be seen in process lists.
    """
    checkpoint = config.model.hf_checkpoint
    return EngineClient(
        teacher_url(config),
        concurrency=config.opd.opd_teacher_concurrency,
        timeout_s=timeout_s or config.opd.opd_teacher_timeout_s,
        # None: a generation's time goes by the tokens that it writes.
        min_tokens_per_s=None if timeout_s else config.opd.opd_teacher_min_tokens_per_s or None,
        retries=config.opd.opd_teacher_retries,
        api_key=os.environ.get(API_KEY_VARIABLE) or None,
        vocabulary_size=None if checkpoint is None else student_facts(Path(checkpoint))[0],
    )


def make_teacher(config: Config) -> SGLangTeacher:
    """The teacher of a run with `--opd-type sglang`."""
    client = teacher_client(config)
    if not (config.teacher_top_k or config.student_top_k):
        return SGLangTeacher(client)
    vocabulary, _ = student_facts(Path(config.model.hf_checkpoint))
    dtype = np.dtype(config.divergence.opd_wire_dtype).type
    return SGLangTeacher(client, Wanted(config.teacher_top_k, config.student_top_k, vocabulary, dtype))


def _kind(error: EngineError) -> str:
    """Failures whose messages differ in numbers alone are of one kind."""
    return "timeout" if isinstance(error, EngineTimeout) else re.sub(r"\d+", "N", str(error))[:120]
