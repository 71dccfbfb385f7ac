"""Metric values that carry their own reduction, so that merging never makes a mean of means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Mean:
    """A mean as its sum and count; without a count it has no value."""

    total: float
    count: float

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(frozen=True)
class Total:
    """A sum over micro-batches and ranks."""

    total: float

    def merge(self, other: Total) -> Total:
        return Total(self.total + other.total)

    @property
    def value(self) -> float | None:
        return self.total


@dataclass(frozen=True)
class Maximum:
    """The largest value anywhere."""

    largest: float

    def merge(self, other: Maximum) -> Maximum:
        return Maximum(max(self.largest, other.largest))

    @property
    def value(self) -> float | None:
        return self.largest


@dataclass(frozen=True)
class Replicated:
    """A value that is the same on every rank, such as the learning rate; NaN where ranks disagree.

    Ranks that disagree train different models; one rank's number would hide it.
    """

    replica: float

    def merge(self, other: Replicated) -> Replicated:
        return self if self.replica == other.replica else Replicated(math.nan)

    @property
    def value(self) -> float | None:
        return self.replica


@dataclass(frozen=True)
class Concentration:
    """The smallest share of tokens that carries 80% of a sum.

    counts, sums: number and sum of the tokens in each bin of their size, smallest first.
    """

    counts: tuple[float, ...]
    sums: tuple[float, ...]

    def merge(self, other: Concentration) -> Concentration:
        add = lambda one, two: tuple(a + b for a, b in zip(one, two, strict=True))  # noqa: E731
        return Concentration(add(self.counts, other.counts), add(self.sums, other.sums))

    @property
    def value(self) -> float | None:
        tokens, left = sum(self.counts), 0.8 * sum(self.sums)
        if not tokens or left <= 0:
            return None
        taken = 0.0
        for count, amount in zip(reversed(self.counts), reversed(self.sums), strict=True):
            # Within a bin tokens are taken as equal.
            if amount >= left:
                return (taken + count * left / amount) / tokens
            left, taken = left - amount, taken + count
        return 1.0


Metric = Mean | Total | Maximum | Replicated | Concentration


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Metrics of several ranks or micro-batches as one."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The metrics as numbers; a mean over nothing is left out."""
    return {name: metric.value for name, metric in metrics.items() if metric.value is not None}


_TYPES: Mapping[str, type[Metric]] = {kind.__name__: kind for kind in (Mean, Total, Maximum, Replicated, Concentration)}


def to_json(metrics: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """The metrics as plain JSON values, for a file."""
    return {name: {"type": type(metric).__name__, **asdict(metric)} for name, metric in metrics.items()}


def from_json(saved: Mapping[str, Mapping[str, Any]]) -> dict[str, Metric]:
    """The inverse of `to_json`. Raises KeyError or TypeError for anything else."""
    metrics = {}
    for name, parts in saved.items():
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in parts.items()}
        metrics[name] = _TYPES[values.pop("type")](**values)
    return metrics
