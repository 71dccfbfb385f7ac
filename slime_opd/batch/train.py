"""A rollout through the trainers: score, assemble, step. Pure but for what the trainers do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from slime_opd.batch.assemble import assemble, penalised_advantages, with_base_advantages
from slime_opd.batch.scores import columns_for_assembly
from slime_opd.batch.shares import plan_shares
from slime_opd.batch.weights import weight_metrics
from slime_opd.config import Config
from slime_opd.metrics import Metric
from slime_opd.objective.options import PolicyOptions, objective_options
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
    """Score the samples, assemble the rollout, take its optimizer steps.

    `progress`: the share (0 to 1) of the run's rollouts that came before. Without trainers (--debug-rollout-only)
    nothing is scored and no step is taken. Returns the samples' batch with base advantages, and training's metrics.
    """
    batch, options = RolloutBatch.from_samples(samples), objective_options(config, progress)
    if trainers is None:
        return with_base_advantages(batch, config, options), {}
    shares = plan_shares(batch, config)
    scores = trainers.score(shares.batches(batch), progress, columns_for_assembly(config, options))
    scored = batch.with_columns(shares.join(scores))
    assembled = assemble(scored, config, options)
    # Only what `assemble` made is sent: the ranks have the rest.
    made = {name: values for name, values in assembled.columns.items() if values is not scored.columns.get(name)}
    if isinstance(options, PolicyOptions) and options.penalty is not None and not options.penalty_in_step:
        made["advantages"] = penalised_advantages(assembled, options.penalty)
    metrics = trainers.step(shares.split(made), progress)
    base = {name: assembled.columns[name] for name in assembled.columns.keys() & {"advantages"}}
    return batch.with_columns(base), {**weight_metrics(assembled, config), **metrics}
