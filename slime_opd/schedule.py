"""Schedules over training progress: which divergence is trained, and the ramp of its coefficient.

Progress is the fraction of the run's rollouts that are done, from 0 to 1. Imports no torch, as the checks use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

KINDS = ("reverse_kl", "forward_kl", "jsd")


@dataclass(frozen=True)
class Stage:
    """A divergence, and the fraction of the run that it is trained for."""

    kind: str
    share: float


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Parse stages such as `forward_kl:0.4,reverse_kl:0.6`. Raises ValueError with the expected form."""
    stages = tuple(Stage(kind, share) for kind, share in _pairs(text, "forward_kl:0.4,reverse_kl:0.6"))
    if unknown := [stage.kind for stage in stages if stage.kind not in KINDS]:
        raise ValueError(f"expected divergences among {', '.join(KINDS)}, not {unknown[0]!r}")
    if any(stage.share <= 0 for stage in stages) or abs(sum(stage.share for stage in stages) - 1) > 1e-6:
        raise ValueError("expected shares above 0 that add up to 1")
    return stages


def kind_at(stages: tuple[Stage, ...], progress: float) -> str:
    """The divergence to train at `progress`."""
    end = 0.0
    for stage in stages:
        end += stage.share
        # The tolerance keeps rounding from taking a rollout from a share such as 0.1.
        if progress < end - 1e-9:
            return stage.kind
    return stages[-1].kind


def parse_ramp(text: str) -> tuple[tuple[float, float], ...]:
    """Parse a ramp such as `0:0,0.3:1` into points (progress, factor). Raises ValueError with the expected form."""
    example = "0:0,0.3:1"
    try:
        points = tuple((float(at), factor) for at, factor in _pairs(text, example))
    except ValueError:
        raise ValueError(f"expected pairs of numbers such as {example}") from None
    progresses = [at for at, _ in points]
    if not all(0 <= at <= 1 for at in progresses) or any(a >= b for a, b in pairwise(progresses)):
        raise ValueError("expected increasing values of progress between 0 and 1")
    if any(factor < 0 for _, factor in points):
        raise ValueError("expected factors of 0 or more")
    return points


def factor_at(ramp: tuple[tuple[float, float], ...], progress: float) -> float:
    """The factor at `progress`: linear between points, constant before the first and after the last."""
    if progress <= ramp[0][0]:
        return ramp[0][1]
    for (start, low), (end, high) in pairwise(ramp):
        if progress <= end:
            return low + (high - low) * (progress - start) / (end - start)
    return ramp[-1][1]


def is_chosen(index: int, share: float) -> bool:
    """Whether item `index` (from 0) is selected when a fraction `share` of a sequence is, evenly spread.

    Of the first n items floor(n * share) are selected, for every n.
    """
    # The tolerance keeps rounding from dropping an item of a share such as 0.1.
    return math.floor((index + 1) * share + 1e-9) > math.floor(index * share + 1e-9)


def _pairs(text: str, example: str) -> list[tuple[str, float]]:
    pairs = []
    for part in text.split(","):
        name, colon, number = part.strip().partition(":")
        try:
            value = float(number) if name and colon else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"expected pairs such as {example}")
        pairs.append((name.strip(), value))
    return pairs
