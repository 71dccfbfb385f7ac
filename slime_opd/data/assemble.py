"""From samples to what each data-parallel rank trains on: advantages, weights of the tokens, and the split.

All of it happens once per rollout, in one place that sees every sample; so group statistics, whitening and denominators
are global without a collective, and cannot depend on how the samples are split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from slime_opd.algorithm.advantages import base_advantages
from slime_opd.algorithm.reduction import token_weights
from slime_opd.config import Config
from slime_opd.data.plan import plan_micro_batches, plan_steps
from slime_opd.types import RolloutBatch, Sample, TrainBatch


def assemble(samples: Sequence[Sample], config: Config) -> RolloutBatch:
    """The rollout as columns, with base advantages and with each token's weight in its step's loss."""
    batch = RolloutBatch.from_samples(samples)
    mask = torch.from_numpy(batch.columns["loss_mask"])
    if not config.is_sft:
        algorithm = config.algorithm
        rewards = batch.columns.get("reward", np.full(len(batch), np.nan, dtype=np.float32))
        advantages = base_advantages(
            torch.from_numpy(rewards),
            torch.from_numpy(batch.columns["group"]),
            torch.from_numpy(batch.response_lengths),
            mask,
            estimator=algorithm.advantage_estimator,
            normalize_rewards=not algorithm.disable_rewards_normalization,
            divide_by_std=not algorithm.disable_grpo_std_normalization,
            whiten_advantages=algorithm.normalize_advantages,
            only_penalty=config.opd.opd_only_reward,
        )
        batch = batch.with_column("advantages", advantages.numpy())
    weights = [
        token_weights(
            torch.from_numpy(step.columns["loss_mask"]),
            torch.from_numpy(step.response_lengths),
            per_token=config.training.calculate_per_token_loss,
        )
        for step in (batch.select(indices) for indices in plan_steps(len(batch), config.global_batch_size))
    ]
    return batch.with_column("policy_weights", torch.cat(weights).numpy())


def split(batch: RolloutBatch, config: Config) -> list[TrainBatch]:
    """One TrainBatch for each data-parallel rank; together they hold every sample of the batch once."""
    training = config.training
    chosen: list[list[np.ndarray]] = [[] for _ in range(config.data_parallel_size)]
    sizes: list[list[tuple[int, ...]]] = [[] for _ in range(config.data_parallel_size)]
    for indices in plan_steps(len(batch), config.global_batch_size):
        ranks = plan_micro_batches(
            batch.total_lengths[indices],
            data_parallel_size=config.data_parallel_size,
            max_tokens=training.max_tokens_per_gpu if training.use_dynamic_batch_size else None,
            micro_batch_size=None if training.use_dynamic_batch_size else training.micro_batch_size,
        )
        for rank, micro_batches in enumerate(ranks):
            # Neighbours of equal length make one attention call on a CPU.
            ordered = [
                indices[micro_batch[np.argsort(batch.total_lengths[indices][micro_batch], kind="stable")]]
                for micro_batch in micro_batches
            ]
            chosen[rank].extend(ordered)
            sizes[rank].append(tuple(len(micro_batch) for micro_batch in ordered))
    return [
        TrainBatch(batch.select(np.concatenate(of_rank)), tuple(steps))
        for of_rank, steps in zip(chosen, sizes, strict=True)
    ]
