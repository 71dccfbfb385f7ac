"""Parser of the `Retry-After` header. Pure."""

from __future__ import annotations

import email.utils
import re

MAX_WAIT_S = 60.0


def retry_after_s(header: str | None, now: float) -> float | None:
    """Seconds to wait, at most MAX_WAIT_S, by a header that holds seconds or an HTTP date; None if it holds neither.

    `now` is the time since the epoch, in seconds.
    """
    text = (header or "").strip()
    if re.fullmatch("[0-9]+", text):
        seconds = float(text[:9])
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - now
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    return min(max(seconds, 0.0), MAX_WAIT_S)
