"""The wire of top-k log-probs: what a server is asked beside the sampled tokens' own, and what its answers mean. Pure.

A server tells the log-probs of its own most likely tokens (`top_logprobs_num`), and of ids of one's own choice
(`token_ids_logprob`), but it takes one list of such ids for a whole request: the union over the positions, each of which then
carries all of them. So the log-probs of other ids at each position (the student's candidates) are had from the server's top N
first, which holds nearly all of them, and those that are missing from a second request, cut into segments of positions with
a short list each, whose prefixes the server has cached. benchmarks/README.md has the bytes and seconds of the ways to ask.

Notation: R response tokens, K candidates, N most likely tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slime_opd.engine.protocol import meta_info, parse_scores, score_payload
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


def parse_rows(rows: Sequence[Any] | None, length: int, k: int) -> TopK:
    """Rows of `[log_prob, id, text or null]`, k for each of `length` positions.

    Raises EngineError where there are fewer or more, or a log-prob is not a finite number.
    """
    if not length:
        return TopK(np.empty((0, k), np.int32), np.empty((0, k), np.float32))
    try:
        table = np.array(rows, dtype=object)
        if table.shape[:2] != (length, k):
            raise EngineError(f"the engine returned {table.shape[:2]} top-k log-probs, expected {(length, k)}")
        found = TopK(table[:, :, 1].astype(np.int32), table[:, :, 0].astype(np.float32))
    except (TypeError, ValueError, IndexError) as error:
        raise EngineError(
            f"the engine returned top-k rows that are not {length} lists of {k} [log_prob, token_id, …]: {str(rows)[:200]}"
        ) from error
    if not np.isfinite(found.log_probs).all():
        raise EngineError("the engine returned a top-k log-prob that is not a finite number")
    return found


def parse_top_k(answer: Mapping[str, Any], length: int, k: int) -> TopK:
    """The server's own k most likely tokens at each of `length` response tokens, from the answer to `score_payload`."""
    # As with the sampled tokens' rows, the first is of the token before the response, and null.
    return parse_rows((meta_info(answer).get("input_top_logprobs") or [None])[1:], length, k)


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


def fill(
    known: np.ndarray,
    candidates: np.ndarray,
    segments: Sequence[Segment],
    answers: Any,
    tokens: Sequence[int],
    prompt_length: int,
) -> np.ndarray:
    """`known` [R, K] with its NaN filled from the answers to `segments_payload`. Raises EngineError as `parse_rows` does."""
    answers = answers if isinstance(answers, list) else [answers]
    if len(answers) != len(segments):
        raise EngineError(f"the engine returned {len(answers)} answers to a batch of {len(segments)}")
    filled = known.copy()
    for segment, answer in zip(segments, answers, strict=True):
        # The tokens themselves are scored again, which tells that the rows are about this segment.
        parse_scores(answer, tokens[: prompt_length + segment.end], prompt_length + segment.start)
        rows = (meta_info(answer).get("input_token_ids_logprobs") or [None])[1:]
        asked = parse_rows(rows, segment.end - segment.start, len(segment.ids))
        if (asked.ids != segment.ids).any():
            raise EngineError("the engine returned log-probs of other candidates than were asked for")
        here = slice(segment.start, segment.end)
        place = np.minimum(np.searchsorted(segment.ids, candidates[here]), len(segment.ids) - 1)
        filled[here] = np.where(np.isnan(known[here]), np.take_along_axis(asked.log_probs, place, axis=1), known[here])
    return filled
