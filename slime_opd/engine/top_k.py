"""The wire protocol of top-k log-probs: payloads of requests, and parsers of their answers. Pure.

A server returns the log-probs of its own most likely tokens (`top_logprobs_num`) and of requested ids
(`token_ids_logprob`), but it takes one list of ids for a whole request, and returns all of them at each position. So
the log-probs of the student's candidates, which differ by position, are first looked up in the server's top N, which
has nearly all of them. Missing ones are requested in segments of positions with a short list of ids each; the server
has cached the prefixes of the segments. benchmarks/README.md compares the bytes and seconds of such requests.

Notation: R response tokens, K candidates, N most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slime_opd.engine.protocol import meta_info, parse_scores, score_payload
from slime_opd.engine.rows import (
    MAX_LOG_PROB,
    MAX_PROBABILITY,
    MIN_LOG_PROB,
    check_ids,
    checked_log_probs,
    columns,
    flatten,
)
from slime_opd.errors import EngineError

# Positions that share a list of missing ids. Shorter segments send the prefix more often; longer ones return more
# log-probs that were requested for other positions.
_SEGMENT = 16


@dataclass(frozen=True, eq=False)
class TopK:
    """Ids int32 [R, K] and their log-probs float32 [R, K], at each token of a response."""

    ids: np.ndarray
    log_probs: np.ndarray


@dataclass(frozen=True, eq=False)
class Segment:
    """Response positions `start` to `end` (exclusive), and the ids requested at each of them, sorted."""

    start: int
    end: int
    ids: np.ndarray


def parse_rows(
    rows: Any, length: int, k: int, *, smallest: float = MIN_LOG_PROB, vocabulary_size: int | None = None
) -> TopK:
    """TopK from rows of `[log_prob, id, text or null]`, k for each of `length` positions.

    Raises EngineError if there are fewer or more rows, an id is not in the vocabulary, a log-prob is not valid
    (`smallest` as for `checked_log_probs`), or the probabilities at one position add up to more than 1.
    """
    if not length:
        return TopK(np.empty((0, k), np.int32), np.empty((0, k), np.float32))
    ids, log_probs = columns(flatten(rows, length, k))
    check_ids(ids, vocabulary_size)
    top = TopK(
        ids.astype(np.int32).reshape(length, k), checked_log_probs(log_probs, "top-k", smallest).reshape(length, k)
    )
    total = np.exp(top.log_probs).sum(axis=1).max()
    if total > MAX_PROBABILITY:
        raise EngineError(f"the engine returned top-k log-probs whose probabilities add up to {total:g}, more than 1")
    return top


def parse_top_k(answer: Any, log_probs: np.ndarray, k: int, vocabulary_size: int | None = None) -> TopK:
    """The server's own k most likely tokens at each response token, from the answer to `score_payload`.

    `log_probs` [R] are those of the response tokens themselves. Raises EngineError as `parse_rows` does, and if a
    response token is likelier than the most likely token.
    """
    top = parse_rows(_after_first(answer, "input_top_logprobs"), len(log_probs), k, vocabulary_size=vocabulary_size)
    if k and (log_probs > top.log_probs.max(axis=1) + MAX_LOG_PROB).any():
        raise EngineError("the engine returned a token's log-prob that is above its most likely token's")
    return top


def _after_first(answer: Any, name: str) -> Any:
    """The rows under `name` without the first, which is for the token before the response and is null."""
    rows = meta_info(answer).get(name)
    return rows[1:] if isinstance(rows, list) else rows


def lookup(candidates: np.ndarray, top: TopK) -> np.ndarray:
    """Log-probs of candidates int [R, K] in `top` [R, N], float32 [R, K]; NaN for candidates that are not in it."""
    if not top.ids.size:
        return np.full(candidates.shape, np.nan, np.float32)
    # One binary search over all sorted (position, id) pairs.
    position = np.arange(len(candidates), dtype=np.int64)[:, None] << 32
    keys, log_probs = (position | top.ids).reshape(-1), top.log_probs.reshape(-1)
    order = np.argsort(keys)
    queries = position | candidates
    nearest = order[np.minimum(np.searchsorted(keys, queries, sorter=order), len(keys) - 1)]
    return np.where(keys[nearest] == queries, log_probs[nearest], np.float32(np.nan))


def missing_segments(candidates: np.ndarray, is_missing: np.ndarray) -> list[Segment]:
    """The segments that have missing candidates (both arguments [R, K]), with the ids that are missing in each."""
    # The request grows with the number of segments times the length of the sequence, the answer with their size.
    size = max(_SEGMENT, int((len(candidates) / 8) ** 0.5))
    segments = []
    for start in range(0, len(candidates), size):
        mask = is_missing[start : start + size]
        positions = np.flatnonzero(mask.any(axis=1))
        if len(positions):
            first, last = start + int(positions[0]), start + int(positions[-1]) + 1
            segments.append(Segment(first, last, np.unique(candidates[start : start + size][mask])))
    return segments


def segments_payload(tokens: Sequence[int], prompt_length: int, segments: Sequence[Segment]) -> dict[str, Any]:
    """The body of one request for all segments: a batch of prefixes of the same sequence."""
    payload = score_payload(tokens, prompt_length)
    payload["input_ids"] = [list(tokens[: prompt_length + segment.end]) for segment in segments]
    payload["logprob_start_len"] = [prompt_length + segment.start - 1 for segment in segments]
    payload["token_ids_logprob"] = [segment.ids.tolist() for segment in segments]
    payload["return_logprob"] = [True] * len(segments)
    return payload


def num_rows(segments: Sequence[Segment]) -> int:
    """Number of log-prob rows in the answers to `segments_payload`."""
    return sum((1 + segment.end - segment.start) * (1 + len(segment.ids)) for segment in segments)


def fill(
    known: np.ndarray,
    candidates: np.ndarray,
    segments: Sequence[Segment],
    answers: Any,
    tokens: Sequence[int],
    prompt_length: int,
    vocabulary_size: int | None = None,
) -> np.ndarray:
    """`known` [R, K] with its NaN entries replaced by log-probs from the answers to `segments_payload`.

    Raises EngineError as `parse_rows` does, and for answers to another request.
    """
    answers = answers if isinstance(answers, list) else [answers]
    if len(answers) != len(segments):
        raise EngineError(f"the engine returned {len(answers)} answers to a batch of {len(segments)}")
    filled = known.copy()
    for segment, answer in zip(segments, answers, strict=True):
        # The tokens themselves are scored again, which proves that the rows belong to this segment.
        parse_scores(answer, tokens[: prompt_length + segment.end], prompt_length + segment.start, vocabulary_size)
        scores = parse_rows(
            _after_first(answer, "input_token_ids_logprobs"), segment.end - segment.start, len(segment.ids)
        )
        if (scores.ids != segment.ids).any():
            raise EngineError("the engine returned log-probs of other candidates than were requested")
        here = slice(segment.start, segment.end)
        index = np.minimum(np.searchsorted(segment.ids, candidates[here]), len(segment.ids) - 1)
        filled[here] = np.where(np.isnan(known[here]), np.take_along_axis(scores.log_probs, index, axis=1), known[here])
    return filled
