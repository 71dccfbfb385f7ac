"""What a chunk of tokens minimises: the streams of the objective, summed over its tokens.

Each stream is Σ_t w_t x_t with weights that were divided by the whole step's denominator before the first micro-batch
(`reduction.token_weights`, `distill.weights`). So chunks, micro-batches and ranks add up to the step's loss, however they
are cut, and one stream never rescales another:

    loss = Σ policy_weights · (clipped policy loss of A − coef · ω · penalty)  −  entropy_coef · Σ policy_weights · H
         + kl_coef · Σ policy_weights · KL(policy ‖ reference)                +  divergence_coef · Σ divergence_weights · D

Notation: R response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slime_opd.algorithm.kl import kl_estimate
from slime_opd.algorithm.policy_loss import clipped_policy_loss
from slime_opd.distill import dynamics
from slime_opd.distill.comparison import Comparison, DivergenceOptions, token_divergence
from slime_opd.distill.penalty import apply_penalty, clamp_signal, sampled_reverse_kl

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PenaltyOptions:
    """The penalty on the sampled tokens: its weight, the largest size of a token's signal, and whose log-probs it takes."""

    coefficient: float
    clamp: float | None = None
    refresh_student: bool = False


@dataclass(frozen=True)
class PolicyOptions:
    """Coefficients of the policy objective; a None leaves its stream out."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coefficient: float
    kl_coefficient: float | None
    kl_kind: str
    use_rollout_log_probs: bool
    penalty: PenaltyOptions | None = None
    divergence: DivergenceOptions | None = None


@dataclass(frozen=True)
class Terms:
    """What the models say about a chunk's tokens.

    log_probs, entropies: of the policy now, [R], differentiable. penalty_log_probs: the policy's log-probs at the teacher's
    temperature, [R], or None where it is the same as the policy's. teacher_log_probs: [R], or None where they are a column
    or nobody's. comparison: the two distributions side by side, or None.
    """

    log_probs: Tensor
    entropies: Tensor
    penalty_log_probs: Tensor | None = None
    teacher_log_probs: Tensor | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Objective:
    """A chunk's part of the loss (a scalar), and its part of the metrics.

    `totals` add up over chunks, micro-batches and ranks; `means` are (sum, count) pairs, all float64 scalars on the device;
    `histograms` are float64 [2, bins] of `dynamics.histogram`, which add up too.
    """

    loss: Tensor
    totals: dict[str, Tensor]
    means: dict[str, Pair]
    histograms: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def sum(parts: Sequence[Objective]) -> Objective:
        """The objective of several chunks together."""
        first = parts[0]
        return Objective(
            torch.stack([part.loss for part in parts]).sum(),
            {name: torch.stack([part.totals[name] for part in parts]).sum() for name in first.totals},
            {
                name: (
                    torch.stack([part.means[name][0] for part in parts]).sum(),
                    torch.stack([part.means[name][1] for part in parts]).sum(),
                )
                for name in first.means
            },
            {name: torch.stack([part.histograms[name] for part in parts]).sum(dim=0) for name in first.histograms},
        )


def policy_objective(columns: Mapping[str, Tensor], terms: Terms, options: PolicyOptions) -> Objective:
    """PPO's clipped loss on advantages with the OPD penalty, minus the entropy bonus, plus reference KL and divergence.

    columns: `advantages` (of the base estimator), `policy_weights`, `loss_mask`, each float32 [R], and where they take
    part `log_probs` (of the policy that starts the rollout's steps), `rollout_log_probs`, `teacher_log_probs`,
    `ref_log_probs`, `penalty_log_probs`, `penalty` (a signal that was made of whole responses), `penalty_weights`,
    `divergence_base`, `divergence_weights`, `position_third`, `correct`.

    Without a `log_probs` column this step is the rollout's first and only one: the old policy is the policy now.
    """
    log_probs, entropies = terms.log_probs, terms.entropies
    weights, mask = columns["policy_weights"], columns["loss_mask"]
    old = _where_trained(_old_log_probs(columns, log_probs, options), log_probs, weights)
    advantages = columns["advantages"]
    means: dict[str, Pair] = {}
    histograms: dict[str, Tensor] = {}
    teacher = columns.get("teacher_log_probs", terms.teacher_log_probs)
    if teacher is not None:
        signal = sampled_reverse_kl(_penalty_student(columns, terms, old, options), teacher)
        means |= dynamics.sampled(signal, teacher, weights, columns)
        if options.penalty is not None:
            signal, clamped = clamp_signal(signal, options.penalty.clamp)
            if options.penalty.clamp is not None:
                means["opd/clamp_fraction"] = dynamics.counted_mean(clamped, weights)
            advantages = apply_penalty(
                advantages,
                columns.get("penalty", signal),
                weights,
                coefficient=options.penalty.coefficient,
                weights=columns.get("penalty_weights"),
            )
        if terms.comparison is None:
            histograms["opd/tokens_with_80_percent"] = dynamics.histogram(signal.abs(), weights)
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
    if options.divergence is not None:
        of_tokens = token_divergence(terms.comparison, options.divergence)
        of_weights = columns["divergence_base"] * columns["divergence_weights"]
        totals["train/divergence_loss"] = (of_weights * of_tokens).sum()
        loss = loss + options.divergence.coefficient * totals["train/divergence_loss"]
        scored = mask * terms.comparison.scored
        means |= dynamics.compared(terms.comparison, of_tokens, entropies, scored, columns)
        histograms["opd/tokens_with_80_percent"] = dynamics.histogram(terms.comparison.reverse_kl, scored)
    totals["train/loss"] = loss
    means |= {
        "train/entropy": dynamics.counted_mean(entropies, mask),
        "train/clip_fraction": dynamics.counted_mean(policy.clipped, weights),
        "train/ppo_kl": dynamics.counted_mean(old - log_probs, weights),
        "train/advantages": dynamics.counted_mean(advantages, weights),
    }
    if "rollout_log_probs" in columns:
        live = columns.get("log_probs", log_probs)
        distance = (live - columns["rollout_log_probs"]).abs()
        means["train/train_rollout_logprob_abs_diff"] = dynamics.counted_mean(distance, weights)
    return Objective(loss, _detached(totals), means, histograms)


def sft_objective(columns: Mapping[str, Tensor], terms: Terms) -> Objective:
    """Negative log-likelihood of the response tokens; columns and shapes as in `policy_objective`."""
    loss = -(columns["policy_weights"] * terms.log_probs).sum()
    mask = columns["loss_mask"]
    means = {
        "train/entropy": dynamics.counted_mean(terms.entropies, mask),
        "train/token_log_probs": dynamics.counted_mean(terms.log_probs, mask),
    }
    return Objective(loss, _detached({"train/loss": loss}), means)


def _old_log_probs(columns: Mapping[str, Tensor], log_probs: Tensor, options: PolicyOptions) -> Tensor:
    if options.use_rollout_log_probs:
        return columns["rollout_log_probs"]
    return columns.get("log_probs", log_probs.detach())


def _penalty_student(columns: Mapping[str, Tensor], terms: Terms, old: Tensor, options: PolicyOptions) -> Tensor:
    """The student's log-probs in the penalty: of the rollout's first policy, or of the policy now."""
    now = terms.log_probs if terms.penalty_log_probs is None else terms.penalty_log_probs
    if options.penalty is not None and options.penalty.refresh_student:
        return now
    return columns.get("penalty_log_probs", old if terms.penalty_log_probs is None else now)


def _where_trained(of_other: Tensor, log_probs: Tensor, weights: Tensor) -> Tensor:
    """Another policy's log-probs where a token trains, else the policy's own.

    What a masked token has there is nobody's business: a NaN (no engine generated it) or an overflow times 0 is NaN.
    """
    return torch.where(weights > 0, of_other, log_probs.detach())


def _detached(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double() for name, value in totals.items()}
