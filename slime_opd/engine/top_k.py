"""The wire of top-k log-probs: what a server is asked beside the sampled tokens' own, and what its answers mean. Pure.

A server tells the log-probs of its own most likely tokens (`top_logprobs_num`), and of ids of one's own choice
(`token_ids_logprob`), but it takes one list of such ids for a whole request: the union over the positions, each of which then
carries all of them. So the log-probs of other ids at each position (the student's candidates) are had from the server's top N
first, which holds nearly all of them, and those that are missing from a second request, cut into segments of positions with
a short list each, whose prefixes the server has cached. benchmarks/README.md has the bytes and seconds of the ways to ask.

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

# Positions that share a list of missing ids: fewer send the prefix more often, more get ids that others asked for.
_SEGMENT = 16


@dataclass(frozen=True, eq=False)
class TopK:
    """Ids int32 [R, K] and their log-probs float32 [R, K], at each token of a response."""

    ids: np.ndarray
    log_probs: np.ndarray


@dataclass(frozen=True, eq=False)
class Segment:
    """Response positions `start` to `end`, and the ids asked for at each of them, sorted."""

    start: int
    end: int
    ids: np.ndarray


def parse_rows(
    rows: Any, length: int, k: int, *, smallest: float = MIN_LOG_PROB, vocabulary_size: int | None = None
) -> TopK:
    """Rows of `[log_prob, id, text or null]`, k for each of `length` positions.

    Raises EngineError where there are fewer or more, an id is not in the vocabulary, a log-prob cannot be one (`smallest` as
    for `checked_log_probs`), or those of one position add up to more than 1.
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

    `log_probs` [R] are those of the response tokens themselves, none of which is likelier than the most likely. Raises
    EngineError as `parse_rows` does.
    """
    top = parse_rows(_after_first(answer, "input_top_logprobs"), len(log_probs), k, vocabulary_size=vocabulary_size)
    if k and (log_probs > top.log_probs.max(axis=1) + MAX_LOG_PROB).any():
        raise EngineError("the engine returned a token's log-prob that is above its most likely token's")
    return top


def _after_first(answer: Any, name: str) -> Any:
    """As with the sampled tokens' rows, the first is of the token before the response, and null."""
    rows = meta_info(answer).get(name)
    return rows[1:] if isinstance(rows, list) else rows


def find(candidates: np.ndarray, top: TopK) -> np.ndarray:
    """Log-probs of candidates int [R, K] as far as `top` [R, N] has them, float32 [R, K], else NaN."""
    if not top.ids.size:
        return np.full(candidates.shape, np.nan, np.float32)
    # One sorted list of (position, id) pairs finds all of them at once.
    place = np.arange(len(candidates), dtype=np.int64)[:, None] << 32
    keys, log_probs = (place | top.ids).reshape(-1), top.log_probs.reshape(-1)
    order = np.argsort(keys)
    wanted = place | candidates
    found = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    return np.where(keys[found] == wanted, log_probs[found], np.float32(np.nan))


def segments_of(candidates: np.ndarray, missing: np.ndarray) -> list[Segment]:
    """The segments that have a missing candidate, both [R, K], and what is missing in each."""
    # What is sent grows with the number of segments times the length, what is received with the length of a segment.
    size = max(_SEGMENT, int((len(candidates) / 8) ** 0.5))
    segments = []
    for start in range(0, len(candidates), size):
        of_segment = missing[start : start + size]
        places = np.flatnonzero(of_segment.any(axis=1))
        if len(places):
            first, last = start + int(places[0]), start + int(places[-1]) + 1
            segments.append(Segment(first, last, np.unique(candidates[start : start + size][of_segment])))
    return segments


def segments_payload(tokens: Sequence[int], prompt_length: int, segments: Sequence[Segment]) -> dict[str, Any]:
    """The body of one request for all segments: a batch of sequences, each the beginning of the same one."""
    payload = score_payload(tokens, prompt_length)
    payload["input_ids"] = [list(tokens[: prompt_length + segment.end]) for segment in segments]
    payload["logprob_start_len"] = [prompt_length + segment.start - 1 for segment in segments]
    payload["token_ids_logprob"] = [segment.ids.tolist() for segment in segments]
    payload["return_logprob"] = [True] * len(segments)
    return payload


def num_rows(segments: Sequence[Segment]) -> int:
    """Log-prob rows in the answers to `segments_payload`."""
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
    """`known` [R, K] with its NaN filled from the answers to `segments_payload`. Raises EngineError as `parse_rows` does."""
    answers = answers if isinstance(answers, list) else [answers]
    if len(answers) != len(segments):
        raise EngineError(f"the engine returned {len(answers)} answers to a batch of {len(segments)}")
    filled = known.copy()
    for segment, answer in zip(segments, answers, strict=True):
        # The tokens themselves are scored again, which tells that the rows are about this segment.
        parse_scores(answer, tokens[: prompt_length + segment.end], prompt_length + segment.start, vocabulary_size)
        asked = parse_rows(
            _after_first(answer, "input_token_ids_logprobs"), segment.end - segment.start, len(segment.ids)
        )
        if (asked.ids != segment.ids).any():
            raise EngineError("the engine returned log-probs of other candidates than were asked for")
        here = slice(segment.start, segment.end)
        place = np.minimum(np.searchsorted(segment.ids, candidates[here]), len(segment.ids) - 1)
        filled[here] = np.where(np.isnan(known[here]), np.take_along_axis(asked.log_probs, place, axis=1), known[here])
    return filled
