"""The limit on responses without teacher scores, past which the run stops. Pure."""

from __future__ import annotations

from slime_opd.errors import TooManyFallbacks


def check_fallback(failed: int, total: int, limit: float, example_reason: str | None = None) -> None:
    """Raise TooManyFallbacks where more than the fraction `limit` of `total` responses has no scores."""
    if failed <= limit * total:
        return
    raise TooManyFallbacks(
        f"the teacher did not score {failed} of {total} responses of this rollout ({failed / total:.1%}), more than "
        f"--opd-max-fallback-fraction {limit:g} allows"
        + (f"; one reason: {example_reason}" if example_reason else "")
        + ". Check the teacher server, raise --opd-teacher-timeout-s, --opd-teacher-retries or the fraction, or lower --opd-teacher-min-tokens-per-s"
    )
