"""A rollout through the trainers: score, assemble, step. Pure but for what the trainers do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from slime_opd.batch.assemble import assemble
from slime_opd.batch.scores import columns_for_assembly
from slime_opd.batch.shares import plan_shares
from slime_opd.batch.weights import weight_statistics
from slime_opd.config import Config
from slime_opd.metrics import Metric, Replicated
from slime_opd.objective.options import objective_options
from slime_opd.types import RolloutBatch, Sample, TrainBatch


class Trainers(Protocol):
    """All ranks of a trainer group. Shares and columns are given and returned per data-parallel rank."""

    def score(
        self, batches: Sequence[TrainBatch], progress: float, names: frozenset[str]
    ) -> list[dict[str, np.ndarray]]:
        """Begin a rollout: run the models whose scores its steps need; returns the scored columns among `names`."""

    def step(self, columns: Sequence[Mapping[str, np.ndarray]], progress: float) -> dict[str, Metric]:
        """Take the optimizer steps of the rollout that was scored, with the columns that were assembled."""


def train_rollout(
    trainers: Trainers | None, samples: Sequence[Sample], config: Config, progress: float
) -> tuple[RolloutBatch, dict[str, Metric]]:
    """Score the samples, assemble the rollout, take its optimizer steps; returns the assembled rollout and the metrics.

    `progress`: the share (0 to 1) of the run's rollouts that came before. Without trainers (--debug-rollout-only)
    nothing is scored and no step is taken.
    """
    batch = RolloutBatch.from_samples(samples)
    options, names = objective_options(config, progress), columns_for_assembly(config)
    if trainers is None:
        return batch if names else assemble(batch, config, options), {}
    shares, sampled = plan_shares(batch, config), set(batch.columns)
    scores = shares.join(trainers.score(shares.batches(batch), progress, names))
    batch = assemble(batch.with_columns(scores), config, options)
    # The ranks have the samples' columns and the scores.
    made = {name: values for name, values in batch.columns.items() if name not in sampled | set(scores)}
    metrics = trainers.step(shares.split(made), progress)
    return batch, {**weight_metrics(batch, config), **metrics}


def weight_metrics(batch: RolloutBatch, config: Config) -> dict[str, Metric]:
    """The spread of the distillation weights in the rollout's last step, by stream; none without distillation."""
    spreads = weight_statistics(batch, config)
    metrics: dict[str, Metric] = {}
    if (penalty := spreads.get("penalty")) is not None:
        metrics["opd/penalty_weight_min"] = Replicated(penalty.minimum)
        metrics["opd/penalty_weight_max"] = Replicated(penalty.maximum)
        metrics["opd/penalty_weight_effective_share"] = Replicated(penalty.effective_share)
    if (divergence := spreads.get("divergence")) is not None:
        metrics["opd/divergence_weight_min"] = Replicated(divergence.minimum)
        metrics["opd/divergence_weight_max"] = Replicated(divergence.maximum)
        metrics["opd/divergence_weight_effective_share"] = Replicated(divergence.effective_share)
    return metrics
