"""One stream of the objective: its part of the loss and of the metrics; and their sum.

A stream is Σ_t w_t x_t with weights that were divided by the whole step's denominator before the first micro-batch. So
chunks, micro-batches and ranks add up to the step's loss, however they are split, and one stream never rescales
another.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Objective:
    """Part of the loss (a scalar, coefficient included) and of the metrics: of a stream, of a chunk, or of all of them.

    `totals` add up over chunks, micro-batches and ranks; `means` are (sum, count) pairs, all float64 scalars on the
    device; `histograms` are float64 [2, bins] of `dynamics.histogram`, which add up too.
    """

    loss: Tensor
    totals: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Pair] = field(default_factory=dict)
    histograms: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of_streams(streams: Sequence[Objective]) -> Objective:
        """The objective of a chunk from its streams, whose metrics have different names; adds `train/loss`."""
        loss = functools.reduce(operator.add, [stream.loss for stream in streams])
        return Objective(
            loss,
            {name: value for stream in streams for name, value in stream.totals.items()} | {"train/loss": total(loss)},
            {name: pair for stream in streams for name, pair in stream.means.items()},
            {name: bins for stream in streams for name, bins in stream.histograms.items()},
        )

    @staticmethod
    def of_chunks(chunks: Sequence[Objective]) -> Objective:
        """The objective of several chunks or micro-batches, which all have the same metrics."""
        first = chunks[0]
        return Objective(
            torch.stack([chunk.loss for chunk in chunks]).sum(),
            {name: torch.stack([chunk.totals[name] for chunk in chunks]).sum() for name in first.totals},
            {
                name: (
                    torch.stack([chunk.means[name][0] for chunk in chunks]).sum(),
                    torch.stack([chunk.means[name][1] for chunk in chunks]).sum(),
                )
                for name in first.means
            },
            {name: torch.stack([chunk.histograms[name] for chunk in chunks]).sum(dim=0) for name in first.histograms},
        )


def total(value: Tensor) -> Tensor:
    """A loss as a metric that adds up: detached, float64."""
    return value.detach().double()
