"""The shares of the data-parallel ranks: which samples each trains on, in which order; there and back. Pure.

Notation: N samples, R response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slime_opd import fields
from slime_opd.batch.plan import plan_micro_batches, plan_steps
from slime_opd.config import Config
from slime_opd.types import RolloutBatch, TrainBatch

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Shares:
    """One entry per data-parallel rank. Together the ranks hold every sample once.

    samples: the indices, int64, of a rank's samples in the rollout, in the order it trains on them. steps: for each
    optimizer step of a rank, the number of samples in each micro-batch. lengths: response tokens of each sample of the
    rollout, int64 [N].
    """

    samples: tuple[np.ndarray, ...]
    steps: tuple[tuple[tuple[int, ...], ...], ...]
    lengths: np.ndarray

    def batches(self, batch: RolloutBatch) -> list[TrainBatch]:
        """What each rank trains on."""
        return [
            TrainBatch(batch.select(samples), steps) for samples, steps in zip(self.samples, self.steps, strict=True)
        ]

    def split(self, columns: Columns) -> list[dict[str, np.ndarray]]:
        """Columns of the rollout as each rank's, in its order."""
        return [{name: values[self._rows(name, rank)] for name, values in columns.items()} for rank in self._ranks]

    def join(self, columns: Sequence[Columns]) -> dict[str, np.ndarray]:
        """Columns of the rollout from those of the ranks, given in the ranks' order."""
        joined = {}
        for name in columns[0]:
            parts = [columns[rank][name] for rank in self._ranks]
            values = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
            for rank, part in zip(self._ranks, parts, strict=True):
                values[self._rows(name, rank)] = part
            joined[name] = values
        return joined

    @property
    def _ranks(self) -> range:
        return range(len(self.samples))

    def _rows(self, name: str, rank: int) -> np.ndarray:
        """The entries of a column of the rollout that are a rank's, in its order."""
        samples = self.samples[rank]
        if fields.field(name).level == fields.SAMPLE:
            return samples
        ends, lengths = np.cumsum(self.lengths)[samples], self.lengths[samples]
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(ends - lengths, lengths) + within


def plan_shares(batch: RolloutBatch, config: Config) -> Shares:
    """How a rollout is split over the data-parallel ranks, by its lengths alone."""
    training, lengths = config.training, batch.total_lengths
    samples: list[list[np.ndarray]] = [[] for _ in range(config.data_parallel_size)]
    steps: list[list[tuple[int, ...]]] = [[] for _ in range(config.data_parallel_size)]
    for indices in plan_steps(len(batch), config.global_batch_size):
        ranks = plan_micro_batches(
            lengths[indices],
            data_parallel_size=config.data_parallel_size,
            max_tokens=training.max_tokens_per_gpu if training.use_dynamic_batch_size else None,
            micro_batch_size=None if training.use_dynamic_batch_size else training.micro_batch_size,
        )
        for rank, micro_batches in enumerate(ranks):
            # Neighbours of equal length make one attention call on a CPU.
            ordered = [indices[one[np.argsort(lengths[indices][one], kind="stable")]] for one in micro_batches]
            samples[rank].extend(ordered)
            steps[rank].append(tuple(len(one) for one in ordered))
    return Shares(
        tuple(np.concatenate(rank) for rank in samples), tuple(tuple(rank) for rank in steps), batch.response_lengths
    )
