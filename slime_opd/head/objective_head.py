"""From a chunk's logits to its objective and the logits' gradient.

Notation: C tokens of the chunk, R response tokens of the micro-batch, K ids per token, V/tp this rank's share of the
vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slime_opd.head.settings import HeadSettings
from slime_opd.head.teacher_comparison import (
    TeacherComparison,
    TeacherStates,
    compare_with_scores,
    compare_with_states,
)
from slime_opd.head.vocabulary import Distribution, TermGradients, VocabularyShard, without_padding
from slime_opd.objective.evaluate import evaluate
from slime_opd.objective.options import PolicyOptions
from slime_opd.objective.streams import Objective
from slime_opd.objective.tokens import Terms, TokenColumns


class ObjectiveHead:
    """The objective of a micro-batch, a chunk at a time.

    targets: int64 [R], the sampled tokens. columns: [R] or [R, K] each. teacher: of a Megatron teacher whose
    distributions are compared. shared: the vocabulary that student and teacher both have, by default the student's; the
    divergence is taken over it.
    """

    def __init__(
        self,
        settings: HeadSettings,
        shard: VocabularyShard,
        targets: Tensor,
        columns: TokenColumns,
        teacher: TeacherStates | None = None,
        shared: VocabularyShard | None = None,
    ) -> None:
        self._settings, self._shard, self._targets, self._columns = settings, shard, targets, columns
        self._teacher, self._shared = teacher, shared or shard

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Objective, Tensor]:
        """The objective of the tokens `rows`, and the gradient of their logits [C, V/tp]."""
        targets, columns = self._targets[rows, None], self._columns.rows(rows)
        policy, student = self._distributions(logits)
        log_probs = policy.log_probs(targets)[:, 0].requires_grad_()
        entropies = policy.entropies().requires_grad_()
        teacher = self._compare(student, rows, columns)
        # The caller is an autograd function, in whose forward nothing is recorded.
        with torch.enable_grad():
            terms = Terms(
                log_probs,
                entropies,
                None if student is policy else student.log_probs(targets)[:, 0],
                None if teacher is None else teacher.teacher_log_probs,
                None if teacher is None else teacher.comparison,
            )
            objective = evaluate(columns, terms, self._settings.objective)
        leaves = [log_probs, entropies, *([] if teacher is None else teacher.leaves)]
        wrt_log_probs, wrt_entropies, *wrt_teacher = _gradients(objective.loss, leaves)
        objective = replace(objective, loss=objective.loss.detach())
        gradients = TermGradients(
            log_probs=() if wrt_log_probs is None else ((targets, wrt_log_probs[:, None]),),
            entropies=None if wrt_entropies is None else (entropies.detach(), wrt_entropies),
        )
        if teacher is None:
            return objective, policy.logit_gradients(gradients)
        of_comparison = teacher.term_gradients(wrt_teacher)
        if student is policy:
            return objective, policy.logit_gradients(gradients.joined(of_comparison))
        return objective, policy.logit_gradients(gradients).add_(student.logit_gradients(of_comparison))

    @torch.no_grad()
    def compare(self, logits: Tensor, rows: slice) -> tuple[Tensor, TeacherComparison]:
        """The student's entropies [C], and its comparison with the teacher, for a pass that trains nothing."""
        policy, student = self._distributions(logits)
        return policy.entropies(), self._compare(student, rows, self._columns.rows(rows))

    def _distributions(self, logits: Tensor) -> tuple[Distribution, Distribution]:
        """The policy's distribution, and the student's in the comparison with the teacher; one object if equal."""
        settings = self._settings
        same = settings.teacher_temperature == settings.temperature and self._shared.size == self._shard.size
        if not isinstance(settings.objective, PolicyOptions) or same:
            policy = Distribution(logits, self._shard, settings.temperature)
            return policy, policy
        policy = Distribution(logits.clone(), self._shard, settings.temperature)
        return policy, Distribution(without_padding(logits, self._shared), self._shared, settings.teacher_temperature)

    def _compare(self, student: Distribution, rows: slice, columns: TokenColumns) -> TeacherComparison | None:
        """Student and teacher of a chunk, if a divergence compares them."""
        if self._settings.divergence is None:
            return None
        if self._teacher is None:
            return compare_with_scores(student, columns, self._settings)
        targets = self._targets[rows]
        return compare_with_states(student, self._teacher, rows, targets, columns, self._shared, self._settings)


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    if not loss.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))
