"""A teacher behind an SGLang server, which scores each response while others are still being generated."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slime_opd.config import Config
from slime_opd.engine.client import EngineClient
from slime_opd.errors import ConfigError, EngineError, EngineTimeout
from slime_opd.teacher.facts import student_facts
from slime_opd.teacher.fingerprint import Reading, read
from slime_opd.teacher.probe import ProbeReport, probe_teacher
from slime_opd.types import Sample, TeacherScores

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "SLIME_OPD_TEACHER_API_KEY"


@dataclass(frozen=True)
class ScoreRequest:
    """What is requested beside the log-probs of the response's own tokens.

    top_k: of the teacher's most likely tokens to keep. student_top_k: of the student's most likely tokens to score.
    vocabulary_size: of the teacher; an SGLang server that is sent a larger number of top tokens ends.
    dtype: of the kept top-k log-probs.
    """

    top_k: int = 0
    student_top_k: int = 0
    vocabulary_size: int = 1 << 30
    dtype: type[np.floating] = np.float32

    @property
    def num_top_tokens(self) -> int:
        """How many of its most likely tokens the server is asked for.

        Nearly all of the student's top-k tokens are among twice as many of the teacher's.
        """
        return min(max(self.top_k, 2 * self.student_top_k), self.vocabulary_size)

    def missing_scores(self, length: int, failure: str | None) -> TeacherScores:
        """NaN scores of `length` tokens, in the shapes that this request gives."""
        top_k, student_top_k = self.top_k, self.student_top_k
        return TeacherScores(
            np.full(length, np.nan, np.float32),
            failure,
            np.zeros((length, top_k), np.int32) if top_k else None,
            np.full((length, top_k), np.nan, self.dtype) if top_k else None,
            np.full((length, student_top_k), np.nan, self.dtype) if student_top_k else None,
        )


class SGLangTeacher:
    """Scores with one SGLang server, at temperature 1.

    A response without an answer, or with one that cannot be its log-probs, is a failure: NaN and a reason. Each kind of
    failure is logged once and counted in `failures`.
    """

    def __init__(
        self,
        client: EngineClient,
        request: ScoreRequest | None = None,
        make_generation_client: Callable[[], EngineClient] | None = None,
    ) -> None:
        """`make_generation_client`: for `generation_client`, which is `client` itself without it."""
        self._client, self._request = client, request or ScoreRequest()
        self._make_generation_client = make_generation_client or (lambda: client)
        self.failures: Counter[str] = Counter()
        self.latest_failure: str | None = None

    @property
    def url(self) -> str:
        """The server's address, without user and password."""
        return self._client.url

    @property
    def num_bytes(self) -> int:
        """Bytes of all score requests and their answers so far."""
        return self._client.bytes_moved

    async def probe(self, tokenizer: Any, student_checkpoint: str | Path) -> ProbeReport:
        """Check that the server can teach the student in the Hugging Face directory `student_checkpoint`.

        Raises TeacherError where it cannot.
        """
        vocabulary_size, eos_ids = student_facts(Path(student_checkpoint))
        return await probe_teacher(self._client, tokenizer, vocabulary_size, eos_ids, self._request.num_top_tokens)

    async def score(self, sample: Sample) -> TeacherScores:
        """The log-probs that the request names; an empty response needs no request."""
        if not sample.response_length:
            return self._request.missing_scores(0, None)
        try:
            return await self._score(sample)
        except EngineError as error:
            return self.failed_scores(sample, error)

    def failed_scores(self, sample: Sample, error: EngineError) -> TeacherScores:
        """NaN scores of a response; counts the failure."""
        self.note_failure(error)
        return self._request.missing_scores(sample.response_length, str(error))

    async def _score(self, sample: Sample) -> TeacherScores:
        request, tokens, start = self._request, sample.tokens, len(sample.prompt.tokens)
        if not request.num_top_tokens:
            return TeacherScores(await self._client.score(tokens, start))
        log_probs, top = await self._client.score_top_k(tokens, start, request.num_top_tokens)
        scores = TeacherScores(log_probs)
        if request.top_k:
            # A copy: a slice would keep all top tokens in memory.
            top_ids = top.ids[:, : request.top_k].copy()
            scores = replace(
                scores, top_ids=top_ids, top_log_probs=top.log_probs[:, : request.top_k].astype(request.dtype)
            )
        if request.student_top_k:
            student_ids = sample.values["student_top_ids"]
            log_probs = await self._client.score_candidates(tokens, start, student_ids, top)
            scores = replace(scores, student_log_probs=log_probs.astype(request.dtype))
        return scores

    async def read(self, sequences: Sequence[Sequence[int]], start: int) -> Reading:
        """Log-probs of the sequences' tokens from `start` on. Raises EngineError where the server does not answer."""
        return await read(self._client, sequences, start)

    def note_failure(self, error: EngineError) -> None:
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

    def generation_client(self) -> EngineClient:
        """A client that generates with the server's model; the caller closes it."""
        return self._make_generation_client()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def make_sglang_teacher(config: Config) -> SGLangTeacher:
    """The teacher of `--opd-type sglang`. Raises ConfigError without --rm-url."""
    opd, rollout, checkpoint = config.opd, config.rollout, config.model.hf_checkpoint
    vocabulary_size = None if checkpoint is None else student_facts(Path(checkpoint))[0]
    client = partial(
        EngineClient,
        _server_url(config),
        concurrency=opd.opd_teacher_concurrency,
        retries=opd.opd_teacher_retries,
        # From the environment: a flag's value can be seen in process lists.
        api_key=os.environ.get(API_KEY_VARIABLE) or None,
        vocabulary_size=vocabulary_size,
    )
    request = ScoreRequest()
    if config.teacher_top_k or config.student_top_k:
        dtype = np.dtype(config.divergence.opd_wire_dtype).type
        request = ScoreRequest(config.teacher_top_k, config.student_top_k, vocabulary_size, dtype)
    return SGLangTeacher(
        client(timeout_s=opd.opd_teacher_timeout_s, min_tokens_per_s=opd.opd_teacher_min_tokens_per_s or None),
        request,
        # Generating takes longer than scoring, and its time depends on the tokens that are generated.
        partial(client, timeout_s=rollout.rollout_request_timeout_s),
    )


def _server_url(config: Config) -> str:
    if not config.reward.rm_url:
        raise ConfigError(
            "--opd-type sglang needs --rm-url, the address of the teacher's SGLang server, such as http://HOST:PORT/generate"
        )
    return config.reward.rm_url.rstrip("/").removesuffix("/generate")


def _kind(error: EngineError) -> str:
    """The failure's kind: its message without its numbers."""
    return "timeout" if isinstance(error, EngineTimeout) else re.sub(r"\d+", "N", str(error))[:120]
