"""The comparison of student and teacher at each token, and the divergence that is trained. Pure.

Notation: R response tokens, K candidate ids per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slime_opd.distill.divergences import distribution, divergence
from slime_opd.distill.token_reward import NORMALIZED, token_reward_direct


@dataclass(frozen=True)
class DivergenceOptions:
    """Which divergence is trained, and how much it weighs.

    `kind`: one of `schedule.KINDS`, or token_reward_direct. `strategy`, `remainder` and `weight_mode` are of candidate
    sets. The clips are the policy loss's, which token_reward_direct shares.
    """

    kind: str
    coefficient: float
    beta: float = 0.5
    strategy: str = "only_stu"
    remainder: str = "tail"
    weight_mode: str = "student_p"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None


@dataclass(frozen=True)
class Candidates:
    """Both models' log-probs on a set of ids of each token.

    log_p, log_q, old_log_p: [R, K], at full-vocabulary normalisation; log_p differentiable, old_log_p of the policy
    that starts the rollout's steps. valid: bool [R, K]. log_p_rest (differentiable), log_q_rest: [R], of the mass
    outside.
    """

    log_p: Tensor
    log_q: Tensor
    valid: Tensor
    log_p_rest: Tensor
    log_q_rest: Tensor
    old_log_p: Tensor


@dataclass(frozen=True)
class Overlap:
    """The student's top-k against the teacher's, [R, k] each: the teacher's ids that are the student's too, and more.

    shared: bool, which of the teacher's top-k ids are in the student's top-k. log_p, log_q: of the teacher's top-k ids.
    student_mass: [R], of the student's top-k.
    """

    shared: Tensor
    log_p: Tensor
    log_q: Tensor
    student_mass: Tensor


@dataclass(frozen=True)
class Comparison:
    """Two distributions at each token: over the whole vocabulary (`full`), or over candidates.

    scored: float [R], 1 where the teacher has a score. full: the divergence over the vocabulary, [R], differentiable,
    or None. reverse_kl, forward_kl: [R], detached, over the same support. teacher_entropies: [R] or None where unknown.
    """

    scored: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    full: Tensor | None = None
    candidates: Candidates | None = None
    teacher_entropies: Tensor | None = None
    overlap: Overlap | None = None


def token_divergence(comparison: Comparison, options: DivergenceOptions) -> Tensor:
    """The trained divergence of each token, [R], differentiable; 0 without gradient where the teacher has no score."""
    if comparison.full is not None:
        return comparison.full * comparison.scored
    candidates = comparison.candidates
    if options.kind == "token_reward_direct":
        loss, _ = token_reward_direct(
            candidates.log_p,
            candidates.old_log_p,
            candidates.log_q,
            candidates.valid,
            weight_mode=options.weight_mode,
            normalize=NORMALIZED[options.strategy],
            clip_low=options.clip_low,
            clip_high=options.clip_high,
            dual_clip=options.dual_clip,
        )
        return loss * comparison.scored
    log_p, log_q = candidate_distributions(candidates, options.remainder)
    return divergence(log_p, log_q, kind=options.kind, beta=options.beta) * comparison.scored


def candidate_distributions(candidates: Candidates, remainder: str) -> tuple[Tensor, Tensor]:
    """Both models as distributions over the candidates, [R, K] or [R, K+1]."""
    return distribution(
        candidates.log_p,
        candidates.log_q,
        candidates.valid,
        candidates.log_p_rest,
        candidates.log_q_rest,
        remainder=remainder,
    )


def over_candidates(
    candidates: Candidates, scored: Tensor, *, teacher_entropies: Tensor | None = None, overlap: Overlap | None = None
) -> Comparison:
    """The comparison over candidates, with the KL of both directions over the set and its tail."""
    with torch.no_grad():
        log_p, log_q = candidate_distributions(candidates, "tail")
        reverse = divergence(log_p, log_q, kind="reverse_kl")
        forward = divergence(log_p, log_q, kind="forward_kl")
    return Comparison(
        scored, reverse, forward, candidates=candidates, teacher_entropies=teacher_entropies, overlap=overlap
    )
