"""Student and teacher compared at each token of a chunk: over the vocabulary or over candidate ids, differentiable.

Notation: C tokens of the chunk, R response tokens of the micro-batch, K candidate ids, V/tp this rank's share of the
vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slime_opd.distill.candidates import candidates, overlap
from slime_opd.distill.comparison import Candidates, Comparison, Overlap, over_candidates
from slime_opd.distill.divergences import log_rest
from slime_opd.head.settings import HeadSettings
from slime_opd.head.vocabulary import Distribution, TermGradients, VocabularyShard, chunk_logits, full_divergence
from slime_opd.objective.tokens import TokenColumns


@dataclass(frozen=True)
class TeacherStates:
    """A Megatron teacher's final hidden states [R, H] at the predicting positions, and its output layer [V/tp, H].

    The layer has the student's rows.
    """

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class TeacherComparison:
    """Both models' terms of a chunk, and how gradients with respect to them reach the student's logits.

    teacher_log_probs: of the sampled tokens, [C], or None where they are a column. slope: of a divergence over the
    whole vocabulary, [C, V/tp]. ids: int [C, K] of the candidates.
    """

    comparison: Comparison
    teacher_log_probs: Tensor | None
    slope: Tensor | None = None
    ids: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """The terms that the loss is differentiated with respect to."""
        if self.slope is not None:
            return [self.comparison.full]
        over = self.comparison.candidates
        return [over.log_p, over.log_p_rest]

    def term_gradients(self, gradients: list[Tensor | None]) -> TermGradients:
        """The gradients with respect to `leaves`, as those of the terms of the student's distribution."""
        if self.slope is not None:
            (divergence,) = gradients
            return TermGradients(divergence=None if divergence is None else (self.slope, divergence))
        over, (log_p, log_p_rest) = self.comparison.candidates, gradients
        return TermGradients(
            log_probs=() if log_p is None else ((self.ids, log_p),),
            log_rest=None if log_p_rest is None else (self.ids, over.valid, over.log_p_rest.detach(), log_p_rest),
        )


def compare_with_states(
    student: Distribution,
    states: TeacherStates,
    rows: slice,
    targets: Tensor,
    columns: TokenColumns,
    shared: VocabularyShard,
    settings: HeadSettings,
) -> TeacherComparison:
    """Compare with a Megatron teacher, whose hidden states of the micro-batch are at hand.

    rows: the chunk's, of `states`. targets: int64 [C], the sampled tokens. shared: the vocabulary that both models
    have.
    """
    hidden = states.hidden[rows].to(states.weight.device, non_blocking=True)
    teacher = Distribution(chunk_logits(hidden, states.weight, shared), shared, settings.teacher_temperature)
    entropies = teacher.entropies()
    shared_ids = None
    if settings.metrics_top_k:
        shared_ids = _overlap(student, *teacher.top_k(min(settings.metrics_top_k, shared.size)))
    target_log_probs = teacher.log_probs(targets[:, None])[:, 0].masked_fill(targets >= shared.size, torch.nan)
    scored = torch.ones_like(columns.loss_mask)
    if settings.top_k == 0:
        full = full_divergence(student, teacher, kind=settings.divergence.kind, beta=settings.divergence.beta)
        values = full.values.clone().requires_grad_()
        comparison = Comparison(scored, full.reverse_kl, full.forward_kl, values, None, entropies, shared_ids)
        return TeacherComparison(comparison, target_log_probs, slope=full.slope)
    if columns.candidate_ids is not None:
        ids, valid = _stored_candidates(columns)
    else:
        student_ids, teacher_ids = student.top_k(settings.top_k)[0], teacher.top_k(settings.top_k)[0]
        ids, valid = candidates(student_ids, teacher_ids, settings.divergence.strategy)
    over = _candidates(student, ids, valid, teacher.log_probs(ids), teacher.log_rest(ids, valid), columns)
    comparison = over_candidates(over, scored, teacher_entropies=entropies, overlap=shared_ids)
    return TeacherComparison(comparison, target_log_probs, ids=ids)


def compare_with_scores(student: Distribution, columns: TokenColumns, settings: HeadSettings) -> TeacherComparison:
    """Compare with a teacher server, on the ids that it scored; a response without scores takes no part."""
    scored = (~columns.teacher_log_probs.isnan()).to(columns.loss_mask.dtype)
    teacher_ids, teacher_log_probs = columns.teacher_top_ids, columns.teacher_top_log_probs
    strategy = settings.divergence.strategy
    if columns.candidate_ids is not None:
        ids, valid = _stored_candidates(columns)
        log_q = columns.candidate_teacher_log_probs
    elif strategy == "intersection":
        # The same set from the teacher's side, whose log-probs of it are known.
        ids, valid = candidates(teacher_ids, student.top_k(settings.top_k)[0], "intersection")
        log_q = teacher_log_probs
    else:
        ids, valid = candidates(columns.student_top_ids, teacher_ids, strategy)
        parts = {"only_stu": [columns.teacher_on_student_log_probs], "only_tch": [teacher_log_probs]}
        log_q = torch.cat(parts.get(strategy, [columns.teacher_on_student_log_probs, teacher_log_probs]), dim=1)
    shared_ids = None
    if teacher_ids is not None:
        shared_ids = _overlap(student, teacher_ids, teacher_log_probs.to(student.log_p.dtype))
    # A failed response has NaN, and NaN times 0 is NaN.
    log_q = torch.where(scored[:, None] > 0, log_q.to(student.log_p.dtype), student.log_probs(ids))
    over = _candidates(student, ids, valid, log_q, log_rest(log_q, valid), columns)
    return TeacherComparison(over_candidates(over, scored, overlap=shared_ids), None, ids=ids)


def _candidates(
    student: Distribution, ids: Tensor, valid: Tensor, log_q: Tensor, log_q_rest: Tensor, columns: TokenColumns
) -> Candidates:
    """Both models on the ids [C, K]; the student's log-probs are leaves to differentiate with respect to."""
    log_p = student.log_probs(ids).requires_grad_()
    log_p_rest = student.log_rest(ids, valid).requires_grad_()
    old = log_p.detach() if columns.candidate_log_probs is None else columns.candidate_log_probs
    return Candidates(log_p, log_q, valid, log_p_rest, log_q_rest.to(log_p.dtype), old)


def _stored_candidates(columns: TokenColumns) -> tuple[Tensor, Tensor]:
    """The candidates that were chosen before the rollout's first step: ids, and which are valid (−1 is none)."""
    ids = columns.candidate_ids
    return ids.clamp(min=0), ids >= 0


def _overlap(student: Distribution, teacher_ids: Tensor, log_q: Tensor) -> Overlap:
    """The student's top-k against the teacher's ids [C, k] and their log-probs [C, k]."""
    student_ids, student_log_p = student.top_k(teacher_ids.shape[1])
    is_shared = overlap(teacher_ids, student_ids)
    return Overlap(is_shared, student.log_probs(teacher_ids), log_q, student_log_p.exp().sum(dim=1))
