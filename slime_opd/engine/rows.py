"""Validated parser of SGLang's log-prob rows `[log_prob, token_id, text or null]`. Pure.

Invalid rows raise EngineError. Types are checked for whole columns: a response may have a million rows.
"""

from __future__ import annotations

from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from slime_opd.errors import EngineError

# A log-prob is at most 0 in exact arithmetic. In float32 `log(softmax)` exceeds 0 by up to 1e-7, and `logit -
# logsumexp` by up to the spacing of float32 at the logit, which is 6e-5 for logits up to 1,024.
MAX_LOG_PROB = 1e-4
# Below -745 a probability is 0 even in float64. Placeholders for a missing log-prob (-9999, -1e30, the smallest
# float32) are below this limit.
MIN_LOG_PROB = -1000.0
SMALLEST_FLOAT32 = float(np.finfo(np.float32).min)
# Upper limit of the sum of different tokens' probabilities at one position: 1 plus rounding.
MAX_PROBABILITY = 1 + 1e-3


def columns(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 [R] and log-probs float64 [R] of R rows; a null is NaN.

    Raises EngineError for anything but a list of rows that begin with a number (or null) and an integer.
    """
    if type(rows) is list and set(map(type, rows)) <= {list} and min(map(len, rows), default=2) >= 2:
        # Column by column: zip(*rows) takes three times as long for a million rows.
        log_probs, ids = list(map(itemgetter(0), rows)), list(map(itemgetter(1), rows))
        # By type, not by isinstance: true is not a number, and 3.0 is not an id.
        if set(map(type, log_probs)) <= {float, int, type(None)} and set(map(type, ids)) <= {int}:
            try:
                return np.array(ids, dtype=np.int64), np.array(log_probs, dtype=np.float64)
            except OverflowError:  # integers with hundreds of digits
                pass
    raise EngineError(f"the engine returned log-prob rows that are not lists of [log_prob, token_id, …]: {brief(rows)}")


def flatten(table: Any, length: int, width: int) -> list[Any]:
    """The rows of `length` lists of `width` rows each, as one list. Raises EngineError for another shape."""
    if (
        type(table) is not list
        or set(map(type, table)) - {list}
        or len(table) != length
        or set(map(len, table)) - {width}
    ):
        raise EngineError(f"the engine returned top-k rows that are not {length} lists of {width} rows: {brief(table)}")
    return list(chain.from_iterable(table))


def checked_log_probs(log_probs: np.ndarray, kind: str, smallest: float = MIN_LOG_PROB) -> np.ndarray:
    """Log-probs float64 [...] as float32, clamped to at most 0. `kind` names what they are for, in messages.

    Raises EngineError if one is not finite, above 0 by more than rounding, or below `smallest`.
    """
    is_valid = (log_probs <= MAX_LOG_PROB) & (log_probs >= smallest)  # false for NaN
    if not is_valid.all():
        bad = np.flatnonzero(~is_valid)
        value = log_probs.reshape(-1)[bad[0]]
        where = f"for {len(bad)} of {log_probs.size} tokens of a {kind} (first at {bad[0]})"
        if not np.isfinite(value):
            raise EngineError(f"the engine returned no finite log-prob {where}")
        expected = "at most 0" if value > 0 else f"at least {smallest:g}"
        raise EngineError(f"the engine returned log-prob {value:g}, expected {expected}, {where}")
    return np.minimum(log_probs, 0.0).astype(np.float32)


def check_ids(ids: np.ndarray, vocabulary_size: int | None) -> None:
    """Raise EngineError if an id is outside the vocabulary. `vocabulary_size` None: not known."""
    largest = np.iinfo(np.int32).max if vocabulary_size is None else vocabulary_size - 1
    bad = ids[(ids < 0) | (ids > largest)]
    if len(bad):
        raise EngineError(f"the engine returned token id {bad[0]}, expected 0 to {largest}")


def brief(value: Any) -> str:
    """The beginning of a value, for messages; for a list, its first two elements."""
    try:
        return repr(value[:2] if isinstance(value, list) else value)[:200]
    except (RecursionError, ValueError):  # nested too deeply, or a number with more digits than Python prints
        return f"a {type(value).__name__}"
