"""What a micro-batch minimises: the streams of the objective, summed over its tokens.

Each stream is Σ_t w_t x_t with weights `policy_weights` that were divided by the whole step's denominator before the first
micro-batch (`reduction.token_weights`). So micro-batches and ranks add up to the step's loss, however they are cut.

Notation: R response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slime_opd.algorithm.kl import kl_estimate
from slime_opd.algorithm.policy_loss import clipped_policy_loss
from slime_opd.distill.penalty import apply_penalty, sampled_reverse_kl


@dataclass(frozen=True)
class PolicyOptions:
    """Coefficients of the policy objective; a None coefficient leaves its stream out."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coefficient: float
    kl_coefficient: float | None
    kl_kind: str
    opd_coefficient: float | None
    use_rollout_log_probs: bool


@dataclass(frozen=True)
class Objective:
    """A micro-batch's part of the loss (a scalar), and its part of the metrics.

    `totals` add up over micro-batches and ranks; `means` are (sum, count) pairs, both float64 scalars on the device.
    """

    loss: Tensor
    totals: dict[str, Tensor]
    means: dict[str, tuple[Tensor, Tensor]]


def policy_objective(
    columns: Mapping[str, Tensor],
    log_probs: Tensor,
    entropies: Tensor,
    penalty_log_probs: Tensor | None,
    options: PolicyOptions,
) -> Objective:
    """PPO's clipped loss on advantages with the OPD penalty, minus the entropy bonus, plus the reference KL.

    columns: `advantages` (of the base estimator), `policy_weights`, `loss_mask`, each float32 [R], and where they take
    part `log_probs` (of the policy that starts the rollout's steps), `rollout_log_probs`, `teacher_log_probs`,
    `ref_log_probs`, `penalty_log_probs`. log_probs, entropies: of the policy now, [R], differentiable.
    penalty_log_probs: the policy's log-probs at the teacher's temperature, [R], or None where it is the same as the policy's.

    Without a `log_probs` column this step is the rollout's first and only one: the old policy is the policy now.
    """
    weights, mask = columns["policy_weights"], columns["loss_mask"]
    old = _where_trained(_old_log_probs(columns, log_probs, options), log_probs, weights)
    advantages = columns["advantages"]
    means = {}
    if options.opd_coefficient is not None:
        student = columns.get("penalty_log_probs", old if penalty_log_probs is None else penalty_log_probs).detach()
        teacher = columns["teacher_log_probs"]
        advantages = apply_penalty(advantages, student, teacher, mask, coefficient=options.opd_coefficient)
        means["opd/reverse_kl"] = _masked(sampled_reverse_kl(student, teacher), mask)
        means["opd/teacher_log_probs"] = _masked(teacher, mask)
    policy = clipped_policy_loss(
        log_probs,
        old,
        advantages,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        dual_clip=options.dual_clip,
    )
    totals = {"train/policy_loss": (weights * policy.loss).sum()}
    loss = totals["train/policy_loss"]
    if options.entropy_coefficient:
        loss = loss - options.entropy_coefficient * (weights * entropies).sum()
    if options.kl_coefficient is not None:
        reference = _where_trained(columns["ref_log_probs"], log_probs, weights)
        kl = kl_estimate(log_probs, reference, kind=options.kl_kind)
        totals["train/kl_loss"] = (weights * kl).sum()
        if options.kl_coefficient:
            loss = loss + options.kl_coefficient * totals["train/kl_loss"]
    totals["train/loss"] = loss
    means |= {
        "train/entropy": _masked(entropies, mask),
        "train/clip_fraction": _masked(policy.clipped, mask),
        "train/ppo_kl": _masked(old - log_probs, mask),
        "train/advantages": _masked(advantages, mask),
    }
    if "rollout_log_probs" in columns:
        live = columns.get("log_probs", log_probs)
        means["train/train_rollout_logprob_abs_diff"] = _masked((live - columns["rollout_log_probs"]).abs(), mask)
    return Objective(loss, _detached(totals), means)


def sft_objective(columns: Mapping[str, Tensor], log_probs: Tensor, entropies: Tensor) -> Objective:
    """Negative log-likelihood of the response tokens; columns and shapes as in `policy_objective`."""
    loss = -(columns["policy_weights"] * log_probs).sum()
    mask = columns["loss_mask"]
    means = {"train/entropy": _masked(entropies, mask), "train/token_log_probs": _masked(log_probs, mask)}
    return Objective(loss, _detached({"train/loss": loss}), means)


def _old_log_probs(columns: Mapping[str, Tensor], log_probs: Tensor, options: PolicyOptions) -> Tensor:
    if options.use_rollout_log_probs:
        return columns["rollout_log_probs"]
    return columns.get("log_probs", log_probs.detach())


def _where_trained(of_other: Tensor, log_probs: Tensor, weights: Tensor) -> Tensor:
    """Another policy's log-probs where a token trains, else the policy's own.

    What a masked token has there is nobody's business: a NaN (no engine generated it) or an overflow times 0 is NaN.
    """
    return torch.where(weights > 0, of_other, log_probs.detach())


def _masked(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count over tokens that train and are not NaN, as float64 scalars."""
    values = values.detach().double()
    counted = (mask > 0) & ~values.isnan()
    return torch.where(counted, values, 0.0).sum(), counted.sum().double()


def _detached(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double() for name, value in totals.items()}
