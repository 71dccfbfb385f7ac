"""Rollouts through a trainer of this process, as a run drives its trainer group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


class Ranks:
    """The trainer group as one of its ranks sees it: every rank calls the same verbs, and scores are exchanged."""

    def __init__(self, trainer) -> None:
        self._trainer = trainer

    def score(self, batches: Sequence, progress: float, names: frozenset[str]) -> list[dict[str, np.ndarray]]:
        import torch.distributed as dist

        layout = self._trainer.layout
        columns = self._trainer.score(batches[layout.data_rank], progress, names)
        of_ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, (layout.data_rank, columns))
        shares: list[dict[str, np.ndarray]] = [{} for _ in batches]
        for data_rank, scored in of_ranks:
            shares[data_rank] |= scored
        return shares

    def step(self, columns: Sequence[Mapping[str, np.ndarray]], progress: float) -> dict:
        return self._trainer.step(columns[self._trainer.layout.data_rank], progress)


def train(trainer, samples: Sequence, progress: float = 0.0) -> dict:
    """Train on samples; returns the rank's metrics, {} where it does not report."""
    from slime_opd.batch.train import train_rollout

    _, metrics = train_rollout(Ranks(trainer), samples, trainer.config, progress)
    return metrics if trainer.layout.reports else {}


def assembled(samples: Sequence, config):
    """The samples as an assembled RolloutBatch, without scores of the trainer."""
    from slime_opd.batch.assemble import assemble
    from slime_opd.objective.options import objective_options
    from slime_opd.types import RolloutBatch

    return assemble(RolloutBatch.from_samples(samples), config, objective_options(config, 0.0))


def train_assembled(trainer, batch, progress: float = 0.0) -> dict:
    """Train on a RolloutBatch that has its advantages and weights; returns the rank's metrics."""
    from slime_opd.batch.shares import plan_shares

    trainer.score(plan_shares(batch, trainer.config).batches(batch)[trainer.layout.data_rank], progress)
    return trainer.step({}, progress)


def log_probs_of(trainer, batch) -> np.ndarray | None:
    """Log-probs of a TrainBatch's response tokens by the present weights; None before the last pipeline stage."""
    model_pass = trainer.model_pass
    scored = model_pass.score(batch, lambda hidden, one: {"log_probs": model_pass.log_probs(hidden, one, 1.0)[0]})
    return scored["log_probs"].numpy() if scored else None
