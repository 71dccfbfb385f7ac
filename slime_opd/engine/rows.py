"""SGLang's log-prob rows `[log_prob, token_id, text or null]` as arrays, believed only where they can be true. Pure.

Every way in which rows can be wrong is an EngineError. Types are checked for whole columns at a time, as a response may have a
million rows.
"""

from __future__ import annotations

from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from slime_opd.errors import EngineError

# A log-prob is at most 0 in exact arithmetic; `log(softmax)` in float32 passes it by 1e-7, and `logit - logsumexp` by the spacing
# of float32 at the logit, which is 6e-5 for logits up to 1,024.
MAX_LOG_PROB = 1e-4
# Below -745 a probability is 0 even in float64. Placeholders for "no log-prob" (-9999, -1e30, the smallest float32) are below this.
MIN_LOG_PROB = -1000.0
SMALLEST_FLOAT32 = float(np.finfo(np.float32).min)
# Different tokens' probabilities at one position add up to at most 1, and so much for rounding.
MAX_PROBABILITY = 1 + 1e-3


def columns(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 [R] and log-probs float64 [R] of R rows; a null is NaN.

    Raises EngineError for anything but a list of rows that begin with a JSON number (or null) and a whole number.
    """
    if type(rows) is list and set(map(type, rows)) <= {list} and min(map(len, rows), default=2) >= 2:
        # Column by column: the same by zip(*rows) takes three times as long for a million rows.
        log_probs, ids = list(map(itemgetter(0), rows)), list(map(itemgetter(1), rows))
        # By type, not by isinstance: true and "1" are no numbers, and 3.0 is no id.
        if set(map(type, log_probs)) <= {float, int, type(None)} and set(map(type, ids)) <= {int}:
            try:
                return np.array(ids, dtype=np.int64), np.array(log_probs, dtype=np.float64)
            except OverflowError:  # whole numbers of hundreds of digits
                pass
    raise EngineError(f"the engine returned log-prob rows that are not lists of [log_prob, token_id, …]: {brief(rows)}")


def flatten(table: Any, length: int, width: int) -> list[Any]:
    """The rows of a list of `length` lists of `width` rows, one after another. Raises EngineError where it has another shape."""
    if (
        type(table) is not list
        or set(map(type, table)) - {list}
        or len(table) != length
        or set(map(len, table)) - {width}
    ):
        raise EngineError(f"the engine returned top-k rows that are not {length} lists of {width} rows: {brief(table)}")
    return list(chain.from_iterable(table))


def checked_log_probs(log_probs: np.ndarray, what: str, smallest: float = MIN_LOG_PROB) -> np.ndarray:
    """Log-probs float64 [...] as float32, at most 0. Raises EngineError where one is not finite, above 0 or below `smallest`."""
    possible = (log_probs <= MAX_LOG_PROB) & (log_probs >= smallest)  # false for NaN
    if not possible.all():
        bad = np.flatnonzero(~possible)
        value = log_probs.reshape(-1)[bad[0]]
        counted = f"for {len(bad)} of {log_probs.size} tokens of a {what} (first at {bad[0]})"
        if not np.isfinite(value):
            raise EngineError(f"the engine returned no finite log-prob {counted}")
        expected = "at most 0" if value > 0 else f"at least {smallest:g}"
        raise EngineError(f"the engine returned log-prob {value:g}, expected {expected}, {counted}")
    return np.minimum(log_probs, 0.0).astype(np.float32)


def check_ids(ids: np.ndarray, vocabulary_size: int | None) -> None:
    """Raise EngineError where an id is outside the vocabulary, as far as its size is known."""
    largest = np.iinfo(np.int32).max if vocabulary_size is None else vocabulary_size - 1
    bad = ids[(ids < 0) | (ids > largest)]
    if len(bad):
        raise EngineError(f"the engine returned token id {bad[0]}, expected 0 to {largest}")


def brief(value: Any) -> str:
    """The beginning of a value, for messages; of a long list its first two elements."""
    try:
        return repr(value[:2] if isinstance(value, list) else value)[:200]
    except (RecursionError, ValueError):  # too deep, or a number of more digits than Python prints
        return f"a {type(value).__name__}"
