"""Metrics of a chunk of tokens: how student and teacher differ. Pure and detached.

Every metric is a (sum, count) pair of float64 scalars, or a histogram; both add up over chunks, micro-batches and
ranks. The formulas are in docs/metrics.md. Overlap and mass metrics are those of Li et al. 2026 (thunlp/OPD),
arXiv:2604.13016.

Notation: R response tokens, k ids of a top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slime_opd.distill.comparison import Comparison

Pair = tuple[Tensor, Tensor]

# Bins of the histogram of divergences: 16 to the decade, from 1e-8 to 1e3 nats.
_DECADES, _PER_DECADE, _SMALLEST = 11, 16, -8.0
BINS = _DECADES * _PER_DECADE + 2

_THIRDS = ("early", "middle", "late")


@dataclass(frozen=True)
class TokenKinds:
    """What means are split by, [R] each or None: the third of its response that a token is in, and 1 where the answer
    is right.
    """

    position_third: Tensor | None
    correct: Tensor | None


def counted_mean(values: Tensor, counted: Tensor) -> Pair:
    """Sum and count of values [R] over tokens where `counted` [R] is positive and the value is not NaN."""
    values = values.detach().double()
    chosen = (counted > 0) & ~values.isnan()
    return torch.where(chosen, values, 0.0).sum(), chosen.sum().double()


def sampled(signal: Tensor, teacher_log_probs: Tensor, counted: Tensor, kinds: TokenKinds) -> dict[str, Pair]:
    """Metrics of the sampled tokens' log-ratio, [R]: its mean, by position and by whether the answer was right."""
    scored = counted * ~signal.isnan()
    return {
        "opd/reverse_kl": counted_mean(signal, counted),
        "opd/teacher_log_probs": counted_mean(teacher_log_probs, scored),
        **_by_kind("opd/reverse_kl", signal, scored, kinds),
    }


def compared(
    comparison: Comparison, divergences: Tensor, entropies: Tensor, scored: Tensor, kinds: TokenKinds
) -> dict[str, Pair]:
    """Metrics of the two distributions.

    divergences, entropies (of the student), scored: [R]; `scored` is positive where a token trains and the teacher has
    a score.
    """
    means = {
        "opd/divergence": counted_mean(divergences, scored),
        "opd/distribution_reverse_kl": counted_mean(comparison.reverse_kl, scored),
        "opd/distribution_forward_kl": counted_mean(comparison.forward_kl, scored),
        **_by_kind("opd/distribution_reverse_kl", comparison.reverse_kl, scored, kinds),
        **_by_kind("opd/distribution_forward_kl", comparison.forward_kl, scored, kinds),
    }
    if comparison.teacher_entropies is not None:
        means["opd/teacher_entropy"] = counted_mean(comparison.teacher_entropies, scored)
        means["opd/entropy_gap"] = counted_mean(entropies - comparison.teacher_entropies, scored)
    if comparison.candidates is not None:
        candidates = comparison.candidates
        means["opd/student_mass_on_candidates"] = counted_mean(1 - candidates.log_p_rest.exp(), scored)
        means["opd/teacher_mass_on_candidates"] = counted_mean(1 - candidates.log_q_rest.exp(), scored)
    if comparison.overlap is not None:
        means |= _overlap(comparison, scored)
    return means


def histogram(divergences: Tensor, counted: Tensor) -> Tensor:
    """Counts and sums of divergences [R] by size, float64 [2, BINS]; values not above 0 are in the first bin, as 0."""
    values = divergences.detach().double()
    chosen = (counted > 0) & ~values.isnan()
    values = torch.where(chosen, values, 0.0).clamp(min=0.0)
    index = ((values.log10() - _SMALLEST) * _PER_DECADE).floor().clamp(-1, BINS - 2).long() + 1
    empty = torch.zeros(2, BINS, dtype=torch.float64, device=values.device)
    return empty.index_add_(1, index, torch.stack([chosen.double(), values]))


def _by_kind(name: str, values: Tensor, counted: Tensor, kinds: TokenKinds) -> dict[str, Pair]:
    means = {}
    if kinds.position_third is not None:
        for number, third in enumerate(_THIRDS):
            means[f"{name}/{third}"] = counted_mean(values, counted * (kinds.position_third == number))
    if kinds.correct is not None:
        means[f"{name}/right"] = counted_mean(values, counted * (kinds.correct == 1))
        means[f"{name}/wrong"] = counted_mean(values, counted * (kinds.correct == 0))
    return means


def _overlap(comparison: Comparison, scored: Tensor) -> dict[str, Pair]:
    overlap = comparison.overlap
    log_p, log_q = overlap.log_p.detach(), overlap.log_q
    p, q = log_p.exp(), log_q.exp()
    counted = overlap.shared & (scored > 0)[:, None]
    shared = counted.double()
    # Means over positions that share at least one token.
    sharing = scored * (shared.sum(dim=1) > 0)
    advantage = -(log_p - log_q) * p / overlap.student_mass[:, None]
    return {
        "opd/overlap_ratio": counted_mean(shared.mean(dim=1), scored),
        "opd/student_mass_on_overlap": counted_mean((p * shared).sum(dim=1), sharing),
        "opd/teacher_mass_on_overlap": counted_mean(torch.where(counted, q, 0.0).sum(dim=1), sharing),
        "opd/overlap_advantage": (torch.where(counted, advantage, 0.0).double().sum(), shared.sum()),
    }
