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
from slime_opd.batch.plan import plan_micro_batches, plan_steps
from slime_opd.config import Config
from slime_opd.distill.weights import normalized, pass_rate_weights, reward_weights
from slime_opd.types import RolloutBatch, Sample, TrainBatch


def assemble(samples: Sequence[Sample], config: Config) -> RolloutBatch:
    """The rollout as columns, with base advantages and with each token's weight in every stream of its step's loss."""
    batch = RolloutBatch.from_samples(samples)
    on_policy = batch.columns.get("off_policy", np.zeros(len(batch))) == 0
    if not config.is_sft:
        batch = batch.with_column("advantages", _advantages(batch, on_policy, config))
    mask = batch.columns["loss_mask"]
    of_student = mask * np.repeat(on_policy, batch.response_lengths)
    batch = batch.with_column("policy_weights", _step_weights(batch, of_student, config))
    return _with_distillation(batch, mask, on_policy, config) if config.opd.use_opd else batch


def _advantages(batch: RolloutBatch, on_policy: np.ndarray, config: Config) -> np.ndarray:
    """Base advantages, [R]: of the student's own responses, among themselves; 0 for others."""
    algorithm, own = config.algorithm, batch.select(np.flatnonzero(on_policy))
    found = base_advantages(
        torch.from_numpy(own.columns.get("reward", np.full(len(own), np.nan, dtype=np.float32))),
        torch.from_numpy(own.columns["group"]),
        torch.from_numpy(own.response_lengths),
        torch.from_numpy(own.columns["loss_mask"]),
        estimator=algorithm.advantage_estimator,
        normalize_rewards=not algorithm.disable_rewards_normalization,
        divide_by_std=not algorithm.disable_grpo_std_normalization,
        whiten_advantages=algorithm.normalize_advantages,
        only_penalty=config.opd.opd_only_reward,
    )
    advantages = np.zeros(len(batch.columns["loss_mask"]), dtype=np.float32)
    advantages[np.repeat(on_policy, batch.response_lengths)] = found.numpy()
    return advantages


def _step_weights(batch: RolloutBatch, mask: np.ndarray, config: Config) -> np.ndarray:
    """Each token's weight in its step's loss, [R]: they add up to 1 over the tokens of a step that `mask` counts."""
    batch = batch.with_column("loss_mask", mask)
    return np.concatenate(
        [
            token_weights(
                torch.from_numpy(step.columns["loss_mask"]),
                torch.from_numpy(step.response_lengths),
                per_token=config.training.calculate_per_token_loss,
            )
            for step in (batch.select(indices) for indices in plan_steps(len(batch), config.global_batch_size))
        ]
    )


def _with_distillation(batch: RolloutBatch, mask: np.ndarray, on_policy: np.ndarray, config: Config) -> RolloutBatch:
    """The batch with the weights of the distillation's streams, and with what its metrics are split by."""
    lengths = batch.response_lengths
    place = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    batch = batch.with_column("position_third", place * 3 // np.maximum(np.repeat(lengths, lengths), 1))
    scored = np.ones_like(mask)
    if config.has_sglang_teacher:
        scored = (~np.isnan(batch.columns["teacher_log_probs"])).astype(np.float32)
    of_samples = np.ones(len(batch), dtype=np.float32)
    if "reward" in batch.columns:
        reward = batch.columns["reward"]
        correct = np.where(np.isnan(reward), np.nan, reward > 0).astype(np.float32)
        batch = batch.with_column("correct", np.repeat(correct, lengths))
        of_samples = _sample_weights(batch, correct, on_policy, config)
    wanted = torch.from_numpy(np.repeat(of_samples, lengths) * scored)
    streams = []
    if config.penalty_coefficient:
        streams.append(("penalty_weights", batch.columns["policy_weights"]))
    if config.has_divergence:
        batch = batch.with_column("divergence_base", _step_weights(batch, mask, config))
        streams.append(("divergence_weights", batch.columns["divergence_base"]))
    rows = np.split(np.arange(int(lengths.sum())), np.cumsum(lengths.reshape(-1, config.global_batch_size).sum(axis=1)))
    for name, base in streams:
        of_steps = [normalized(wanted[step], torch.from_numpy(base[step])) for step in rows]
        batch = batch.with_column(name, torch.cat(of_steps).numpy())
    return batch


def _sample_weights(batch: RolloutBatch, correct: np.ndarray, on_policy: np.ndarray, config: Config) -> np.ndarray:
    """What each sample counts in the distillation, [N], up to a factor."""
    options = config.divergence
    weights = torch.ones(len(batch))
    if options.opd_reward_beta is not None:
        weights = weights * reward_weights(torch.from_numpy(correct), options.opd_reward_beta)
    if options.opd_pass_rate_weights:
        of_student = torch.from_numpy(np.where(on_policy, correct, np.nan).astype(np.float32))
        groups = torch.from_numpy(batch.columns["group"])
        weights = weights * pass_rate_weights(of_student, groups, *options.opd_pass_rate_weights)
    return weights.float().numpy()


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
