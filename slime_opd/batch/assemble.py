"""From samples and scores to what an optimizer step reads: advantages, and each token's weight in every stream.

All of it is made here, once per rollout, where every sample is known: group statistics, whitening and denominators are
global without a collective, and cannot depend on how the samples are split over ranks.
"""

from __future__ import annotations

import numpy as np
import torch

from slime_opd.algorithm.advantages import base_advantages
from slime_opd.algorithm.estimators import ESTIMATORS
from slime_opd.algorithm.estimators.estimator import EstimatorOptions, Responses
from slime_opd.batch.weights import step_weights, with_distillation_weights
from slime_opd.config import Config
from slime_opd.distill.penalty import PenaltyOptions, clamp_signal, penalty_return, sampled_reverse_kl, subtract_penalty
from slime_opd.errors import ConfigError
from slime_opd.objective.options import Options, PolicyOptions
from slime_opd.types import RolloutBatch


def assemble(batch: RolloutBatch, config: Config, options: Options) -> RolloutBatch:
    """The rollout with base advantages and with each token's weight in every stream of its step's loss.

    `batch` has the samples' own columns, and those of `scores.columns_for_assembly`.
    """
    on_policy, mask = _on_policy(batch), batch.columns["loss_mask"]
    own_mask = mask * np.repeat(on_policy, batch.response_lengths)
    batch = batch.with_column("policy_weights", step_weights(batch, own_mask, config))
    batch = with_base_advantages(batch, config, options)
    if isinstance(options, PolicyOptions) and config.opd.use_opd:
        batch = _with_distillation(batch, mask, on_policy, config)
    return batch


def with_base_advantages(batch: RolloutBatch, config: Config, options: Options) -> RolloutBatch:
    """The rollout with `advantages`: of the student's own responses, among themselves; 0 for others.

    Unchanged for an objective without advantages. Raises ConfigError if a column that the estimator needs is missing.
    """
    if not isinstance(options, PolicyOptions):
        return batch
    algorithm, on_policy = config.algorithm, _on_policy(batch)
    needs = ESTIMATORS[algorithm.advantage_estimator].needs
    if missing := needs - batch.columns.keys():
        raise ConfigError(
            f"--advantage-estimator {algorithm.advantage_estimator} needs {', '.join(sorted(missing))}, which no forward pass of this run scores"
        )
    own = batch if on_policy.all() else batch.select(np.flatnonzero(on_policy))
    responses = Responses(
        rewards=torch.from_numpy(own.columns.get("reward", np.full(len(own), np.nan, dtype=np.float32))),
        groups=torch.from_numpy(own.columns["group"]),
        lengths=torch.from_numpy(own.response_lengths),
        mask=torch.from_numpy(own.columns["loss_mask"]),
        scores={name: torch.from_numpy(own.columns[name]) for name in needs},
    )
    own_advantages = base_advantages(
        responses,
        EstimatorOptions(
            normalize_rewards=not algorithm.disable_rewards_normalization,
            divide_by_std=not algorithm.disable_grpo_std_normalization,
        ),
        estimator=algorithm.advantage_estimator,
        whiten_advantages=algorithm.normalize_advantages,
        only_penalty=config.opd.opd_only_reward,
    )
    advantages = np.zeros(len(batch.columns["loss_mask"]), dtype=np.float32)
    advantages[np.repeat(on_policy, batch.response_lengths)] = own_advantages.numpy()
    return batch.with_column("advantages", advantages)


def _on_policy(batch: RolloutBatch) -> np.ndarray:
    """Whether each sample is the student's own, bool [N]."""
    return batch.columns.get("off_policy", np.zeros(len(batch))) == 0


def _with_distillation(batch: RolloutBatch, mask: np.ndarray, on_policy: np.ndarray, config: Config) -> RolloutBatch:
    """The batch with the weights of the distillation's streams, and with the columns that its metrics are split by."""
    lengths = batch.response_lengths
    index = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    batch = batch.with_column("position_third", index * 3 // np.maximum(np.repeat(lengths, lengths), 1))
    correct = None
    if "reward" in batch.columns:
        reward = batch.columns["reward"]
        correct = np.where(np.isnan(reward), np.nan, reward > 0).astype(np.float32)
        batch = batch.with_column("correct", np.repeat(correct, lengths))
    if config.has_divergence:
        batch = batch.with_column("divergence_base", step_weights(batch, mask, config))
    return with_distillation_weights(batch, correct, on_policy, config)


def penalised_advantages(batch: RolloutBatch, options: PenaltyOptions) -> np.ndarray:
    """The advantages, float32 [R], with the penalty of the policy that starts the rollout's first step subtracted."""
    columns = {name: torch.from_numpy(values) for name, values in batch.columns.items()}
    student, teacher = columns.get("penalty_log_probs", columns["log_probs"]), columns["teacher_log_probs"]
    mask = columns["policy_weights"]
    if options.discount:
        lengths = torch.from_numpy(batch.response_lengths)
        signal = penalty_return(student, teacher, mask, lengths, options)
    else:
        signal, _ = clamp_signal(sampled_reverse_kl(student, teacher), options.clamp)
    penalised = subtract_penalty(
        columns["advantages"], signal, mask, coefficient=options.coefficient, weights=columns["penalty_weights"]
    )
    return penalised.numpy()
