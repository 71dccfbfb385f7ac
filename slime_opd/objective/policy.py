"""The policy objective: the streams that a policy step minimises, summed over a chunk's tokens.

    loss = Σ policy_weights · (clipped policy loss of A − coef · ω · penalty)
         − entropy_coef · Σ policy_weights · H
         + kl_coef · Σ policy_weights · KL(policy ‖ reference)
         + divergence_coef · Σ divergence_base · divergence_weights · D

Notation: C tokens of the chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime_opd.algorithm.kl import kl_estimate
from slime_opd.algorithm.policy_loss import clipped_policy_loss
from slime_opd.distill import dynamics
from slime_opd.distill.comparison import DivergenceOptions, token_divergence
from slime_opd.distill.penalty import clamp_signal, sampled_reverse_kl, subtract_penalty
from slime_opd.objective.options import PolicyOptions
from slime_opd.objective.streams import Objective, total
from slime_opd.objective.tokens import Terms, TokenColumns


def policy_objective(columns: TokenColumns, terms: Terms, options: PolicyOptions) -> Objective:
    """The clipped policy loss with the OPD penalty, minus the entropy bonus, plus reference KL and divergence."""
    streams = [policy_stream(columns, terms, options), entropy_stream(columns, terms, options)]
    if options.kl_coefficient is not None:
        streams.append(reference_kl_stream(columns, terms, options))
    if options.divergence is not None:
        streams.append(divergence_stream(columns, terms, options.divergence))
    return Objective.of_streams(streams)


def policy_stream(columns: TokenColumns, terms: Terms, options: PolicyOptions) -> Objective:
    """Σ policy_weights · clipped policy loss of the advantages, from which the penalty is subtracted."""
    weights, log_probs = columns.policy_weights, terms.log_probs
    advantages, signal = _penalised_advantages(columns, terms, options)
    old = _where_trained(_old_log_probs(columns, log_probs, options), log_probs, weights)
    policy = clipped_policy_loss(
        log_probs,
        old,
        advantages,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        dual_clip=options.dual_clip,
    )
    loss = (weights * policy.loss).sum()
    means = {
        **signal.means,
        "train/clip_fraction": dynamics.counted_mean(policy.clipped, weights),
        "train/ppo_kl": dynamics.counted_mean(old - log_probs, weights),
        "train/advantages": dynamics.counted_mean(advantages, weights),
    }
    if columns.rollout_log_probs is not None:
        training = log_probs if columns.log_probs is None else columns.log_probs
        distance = (training - columns.rollout_log_probs).abs()
        means["train/train_rollout_logprob_abs_diff"] = dynamics.counted_mean(distance, weights)
    return Objective(loss, {"train/policy_loss": total(loss)}, means, signal.histograms)


def entropy_stream(columns: TokenColumns, terms: Terms, options: PolicyOptions) -> Objective:
    """−entropy_coef · Σ policy_weights · H; the entropy is a metric also where the coefficient is 0."""
    loss = terms.entropies.new_zeros(())
    if options.entropy_coefficient:
        loss = -(options.entropy_coefficient * (columns.policy_weights * terms.entropies).sum())
    return Objective(loss, means={"train/entropy": dynamics.counted_mean(terms.entropies, columns.loss_mask)})


def reference_kl_stream(columns: TokenColumns, terms: Terms, options: PolicyOptions) -> Objective:
    """kl_coef · Σ policy_weights · KL(policy ‖ reference)."""
    reference = _where_trained(columns.ref_log_probs, terms.log_probs, columns.policy_weights)
    kl = (columns.policy_weights * kl_estimate(terms.log_probs, reference, kind=options.kl_kind)).sum()
    # A coefficient of 0 watches the KL without training on it; 0 times an infinite gradient would be NaN.
    loss = options.kl_coefficient * kl if options.kl_coefficient else kl.new_zeros(())
    return Objective(loss, {"train/kl_loss": total(kl)})


def divergence_stream(columns: TokenColumns, terms: Terms, options: DivergenceOptions) -> Objective:
    """divergence_coef · Σ divergence_base · divergence_weights · D(student, teacher)."""
    comparison = terms.comparison
    divergences = token_divergence(comparison, options)
    divergence = (columns.divergence_base * columns.divergence_weights * divergences).sum()
    scored = columns.loss_mask * comparison.scored
    return Objective(
        options.coefficient * divergence,
        {"train/divergence_loss": total(divergence)},
        dynamics.compared(comparison, divergences, terms.entropies, scored, columns.kinds),
        {"opd/kl_top80_token_fraction": dynamics.histogram(comparison.reverse_kl, scored)},
    )


def _penalised_advantages(columns: TokenColumns, terms: Terms, options: PolicyOptions) -> tuple[Tensor, Objective]:
    """The advantages with the penalty subtracted, and the metrics of the penalty's signal."""
    weights, advantages, penalty = columns.policy_weights, columns.advantages, options.penalty
    teacher = terms.teacher_log_probs if columns.teacher_log_probs is None else columns.teacher_log_probs
    metrics = Objective(weights.new_zeros(()))
    if teacher is None:
        return advantages, metrics
    student = _where_trained(_penalty_student(columns, terms, options), terms.log_probs, weights)
    signal = sampled_reverse_kl(student, teacher)
    metrics.means.update(dynamics.sampled(signal, teacher, weights, columns.kinds))
    if penalty is not None:
        signal, clamped = clamp_signal(signal, penalty.clamp)
        if penalty.clamp is not None:
            metrics.means["opd/clamp_fraction"] = dynamics.counted_mean(clamped, weights)
        if options.penalty_in_step:
            advantages = subtract_penalty(
                advantages,
                signal if columns.penalty_return is None else columns.penalty_return,
                weights,
                coefficient=penalty.coefficient,
                weights=columns.penalty_weights,
            )
    if terms.comparison is None:
        metrics.histograms["opd/kl_top80_token_fraction"] = dynamics.histogram(signal.abs(), weights)
    return advantages, metrics


def _penalty_student(columns: TokenColumns, terms: Terms, options: PolicyOptions) -> Tensor:
    """The student's log-probs in the penalty, by the trainer: of the rollout's first policy, or the present one."""
    present = terms.log_probs if terms.penalty_log_probs is None else terms.penalty_log_probs
    if options.penalty is not None and options.penalty.refresh_student:
        return present
    if columns.penalty_log_probs is not None:
        return columns.penalty_log_probs
    return present if columns.log_probs is None or terms.penalty_log_probs is not None else columns.log_probs


def _old_log_probs(columns: TokenColumns, log_probs: Tensor, options: PolicyOptions) -> Tensor:
    """The denominator of the ratio."""
    # Without any such column, every response is another model's, and no token has a weight in the policy loss.
    if options.use_rollout_log_probs and columns.rollout_log_probs is not None:
        return columns.rollout_log_probs
    return log_probs.detach() if columns.log_probs is None else columns.log_probs


def _where_trained(other_log_probs: Tensor, log_probs: Tensor, weights: Tensor) -> Tensor:
    """Another policy's log-probs where a token trains, else the policy's own.

    Masked tokens may hold NaN or an overflow there: replace them before multiplying by zero.
    """
    return torch.where(weights > 0, other_log_probs, log_probs.detach())
