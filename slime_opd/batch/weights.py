"""The weights of tokens in the streams of their step's loss, denominators included. Pure.

Notation: N samples, R response tokens of a rollout.
"""

from __future__ import annotations

import numpy as np
import torch

from slime_opd.algorithm.reduction import token_weights
from slime_opd.batch.plan import plan_steps
from slime_opd.config import Config
from slime_opd.distill.weights import (
    WeightStatistics,
    keep_top,
    normalized,
    pass_rate_weights,
    reward_weights,
    statistics,
    token_importance,
)
from slime_opd.metrics import Metric, Replicated
from slime_opd.types import RolloutBatch

# By stream: the column of its distillation weights ω, and the column of base weights that they multiply.
STREAMS = {"penalty": ("penalty_weights", "policy_weights"), "divergence": ("divergence_weights", "divergence_base")}


def step_rows(batch: RolloutBatch, config: Config) -> list[slice]:
    """The response tokens of each optimizer step, as slices of the rollout's columns."""
    per_step = batch.response_lengths.reshape(-1, config.global_batch_size).sum(axis=1)
    ends = np.cumsum(per_step)
    return [slice(int(end - count), int(end)) for end, count in zip(ends, per_step, strict=True)]


def step_weights(batch: RolloutBatch, mask: np.ndarray, config: Config) -> np.ndarray:
    """Each token's weight in its step's loss, float32 [R]: over the unmasked tokens of a step they add up to 1."""
    steps = zip(plan_steps(len(batch), config.global_batch_size), step_rows(batch, config), strict=True)
    return torch.cat(
        [
            token_weights(
                torch.from_numpy(mask[rows]),
                torch.from_numpy(batch.response_lengths[samples]),
                per_token=config.training.calculate_per_token_loss,
            )
            for samples, rows in steps
        ]
    ).numpy()


def with_distillation_weights(
    batch: RolloutBatch, correct: np.ndarray | None, on_policy: np.ndarray, config: Config
) -> RolloutBatch:
    """The batch with the weights of each distillation stream of the run, relative to the stream's own.

    correct: float [N], see `sample_weights`; on_policy: bool [N]. ω = sample weight × token importance; 0 where a
    server's teacher has no score; scaled so that Σ base · ω = 1 over a step.
    """
    weights = np.repeat(sample_weights(batch, correct, on_policy, config), batch.response_lengths)
    if config.teacher.scores_rollouts:
        weights = weights * (~np.isnan(batch.columns["teacher_log_probs"])).astype(np.float32)
    streams = [
        name
        for name, present in (("penalty", config.penalty_coefficient), ("divergence", config.has_divergence))
        if present
    ]
    for stream in streams:
        name, base_name = STREAMS[stream]
        base, steps = torch.from_numpy(batch.columns[base_name]), []
        for rows in step_rows(batch, config):
            relative = normalized(torch.from_numpy(weights[rows]), base[rows])
            if config.divergence.opd_token_weighting is not None:
                token_base = base[rows] * relative
                relative = relative * normalized(_importance(batch, rows, token_base > 0, config), token_base)
            steps.append(relative)
        batch = batch.with_column(name, torch.cat(steps).numpy())
    return batch


def sample_weights(
    batch: RolloutBatch, correct: np.ndarray | None, on_policy: np.ndarray, config: Config
) -> np.ndarray:
    """Each sample's weight in the distillation, float32 [N], up to a factor.

    correct: 1 where the answer is right, 0 where it is wrong, NaN where nothing rewarded it; None without rewards.
    """
    options, weights = config.divergence, torch.ones(len(batch))
    if correct is None:
        return weights.numpy()
    if options.opd_reward_beta is not None:
        weights = weights * reward_weights(torch.from_numpy(correct), options.opd_reward_beta)
    if options.opd_pass_rate_weights:
        by_student = torch.from_numpy(np.where(on_policy, correct, np.nan).astype(np.float32))
        groups = torch.from_numpy(batch.columns["group"])
        weights = weights * pass_rate_weights(by_student, groups, *options.opd_pass_rate_weights)
    return weights.float().numpy()


def weight_statistics(batch: RolloutBatch, config: Config) -> dict[str, WeightStatistics]:
    """The spread of the distillation weights in the rollout's last step, by stream."""
    rows = step_rows(batch, config)[-1]
    return {
        stream: statistics(torch.from_numpy(batch.columns[name][rows]), torch.from_numpy(batch.columns[base][rows]))
        for stream, (name, base) in STREAMS.items()
        if name in batch.columns
    }


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


def _importance(batch: RolloutBatch, rows: slice, counted: torch.Tensor, config: Config) -> torch.Tensor:
    """The importance of the tokens of a step, relative to the others of the step that a stream counts (bool [R])."""
    entropies, divergences = (
        torch.from_numpy(batch.columns[name][rows]) for name in ("student_entropy", "token_divergence")
    )
    counted = counted & ~divergences.isnan()
    scores = token_importance(entropies, torch.where(counted, divergences, 0.0))
    if config.divergence.opd_token_weighting == "soft":
        return torch.where(counted, scores, 0.0)
    return keep_top(scores, counted, config.divergence.opd_token_keep_fraction)
