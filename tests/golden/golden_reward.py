"""The custom reward of the recorded rollouts."""

from __future__ import annotations


def every_other(args: object, sample: object) -> float:
    """1 if the response has an even number of tokens, otherwise 0."""
    return float(sample.response_length % 2 == 0)
