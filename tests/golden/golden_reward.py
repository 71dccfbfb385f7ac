"""The reward of the recorded rollouts."""

from __future__ import annotations


def every_other(args: object, sample: object) -> float:
    """1 for a response of an even number of tokens."""
    return float(sample.response_length % 2 == 0)
