"""From a chunk's logits to its objective: what student and teacher say of the tokens, the loss, and the logits' gradient.

Notation: C tokens of a chunk, R response tokens of a micro-batch, K candidate ids, V/tp this rank's share of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slime_opd.distill.candidates import candidates, overlap
from slime_opd.distill.comparison import Candidates, Comparison, DivergenceOptions, Overlap, over_candidates
from slime_opd.distill.divergences import log_rest
from slime_opd.head.vocabulary import Distribution, VocabularyShard, chunk_logits, full_divergence, without_padding
from slime_opd.objective.evaluate import evaluate
from slime_opd.objective.options import Options, PolicyOptions
from slime_opd.objective.streams import Objective
from slime_opd.objective.tokens import Terms, TokenColumns


@dataclass(frozen=True)
class TeacherStates:
    """A Megatron teacher's final hidden states [R, H] at the predicting positions, and its output layer [V/tp, H].

    The layer has the student's rows.
    """

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class HeadSettings:
    """How a chunk is scored: the objective, the temperatures of student and teacher, and the sizes of top-k sets."""

    objective: Options
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    top_k: int = 0
    metrics_top_k: int = 0

    @property
    def divergence(self) -> DivergenceOptions | None:
        """The divergence that compares student and teacher, if the objective has one."""
        return self.objective.divergence if isinstance(self.objective, PolicyOptions) else None


class ObjectiveHead:
    """The objective of a micro-batch, a chunk at a time.

    targets int64 [R]; columns: response-level arrays, [R] or [R, K]. shared: the ids that the teacher has too, on which the
    two are compared; None where those are all.
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
        settings = self._settings
        targets, columns = self._targets[rows, None], self._columns.rows(rows)
        policy, student = self._distributions(logits)
        log_probs = policy.log_probs(targets)[:, 0].requires_grad_()
        entropies = policy.entropies().requires_grad_()
        side = self.side_by_side(student, rows, columns)
        # The caller is an autograd function, in whose forward nothing is recorded.
        with torch.enable_grad():
            terms = Terms(
                log_probs,
                entropies,
                None if student is policy else student.log_probs(targets)[:, 0],
                None if side is None else side.teacher_log_probs,
                None if side is None else side.comparison,
            )
            objective = evaluate(columns, terms, settings.objective)
        leaves = [log_probs, entropies, *([] if side is None else side.leaves)]
        of_log_probs, of_entropies, *of_side = _gradients(objective.loss, leaves)
        objective = replace(objective, loss=objective.loss.detach())
        asked = {
            "of_log_probs": [(targets, of_log_probs[:, None])] if of_log_probs is not None else [],
            "of_entropies": None if of_entropies is None else (entropies.detach(), of_entropies),
        }
        if side is None:
            return objective, policy.logit_gradients(**asked)
        if student is policy:
            both = side.asked(of_side)
            asked["of_log_probs"] = [*asked["of_log_probs"], *both.pop("of_log_probs", [])]
            return objective, policy.logit_gradients(**asked, **both)
        return objective, policy.logit_gradients(**asked).add_(student.logit_gradients(**side.asked(of_side)))

    @torch.no_grad()
    def compare(self, logits: Tensor, rows: slice) -> tuple[Tensor, SideBySide]:
        """The student's entropies [C] and both models side by side, for a pass that trains nothing."""
        columns = self._columns.rows(rows)
        policy, student = self._distributions(logits)
        return policy.entropies(), self.side_by_side(student, rows, columns)

    def _distributions(self, logits: Tensor) -> tuple[Distribution, Distribution]:
        """The policy's distribution, and the student's as the teacher is compared with it; one where they are the same."""
        settings = self._settings
        same = settings.teacher_temperature == settings.temperature and self._shared.size == self._shard.size
        if not isinstance(settings.objective, PolicyOptions) or same:
            policy = Distribution(logits, self._shard, settings.temperature)
            return policy, policy
        policy = Distribution(logits.clone(), self._shard, settings.temperature)
        return policy, Distribution(without_padding(logits, self._shared), self._shared, settings.teacher_temperature)

    def side_by_side(self, student: Distribution, rows: slice, columns: TokenColumns) -> SideBySide | None:
        """Student and teacher of a chunk, if a divergence compares them."""
        divergence = self._settings.divergence
        if divergence is None:
            return None
        scored = torch.ones_like(columns.loss_mask)
        if self._teacher is None:
            return self._with_remote_teacher(student, columns)
        hidden = self._teacher.hidden[rows].to(self._teacher.weight.device, non_blocking=True)
        teacher = Distribution(
            chunk_logits(hidden, self._teacher.weight, self._shared), self._shared, self._settings.teacher_temperature
        )
        known = {
            "teacher_entropies": teacher.entropies(),
            "overlap": self._overlap(student, *_top_k(teacher, min(self._settings.metrics_top_k, self._shared.size))),
        }
        targets = self._targets[rows]
        teacher_log_probs = teacher.log_probs(targets[:, None])[:, 0].masked_fill(
            targets >= self._shared.size, torch.nan
        )
        if self._settings.top_k == 0:
            full = full_divergence(student, teacher, kind=divergence.kind, beta=divergence.beta)
            values = full.values.clone().requires_grad_()
            comparison = Comparison(scored, full.reverse_kl, full.forward_kl, full=values, **known)
            return SideBySide(comparison, teacher_log_probs, slope=full.slope)
        if columns.candidate_ids is not None:
            ids, valid = _stored(columns)
        else:
            student_ids = student.top_k(self._settings.top_k)[0]
            ids, valid = candidates(
                student_ids, teacher.top_k(self._settings.top_k)[0], self._settings.divergence.strategy
            )
        log_q, log_q_rest = teacher.log_probs(ids), teacher.log_rest(ids, valid)
        return self._on_candidates(student, ids, valid, log_q, log_q_rest, scored, columns, teacher_log_probs, known)

    def _with_remote_teacher(self, student: Distribution, columns: TokenColumns) -> SideBySide:
        """Both models on the ids that a server was asked for; a response without scores takes no part."""
        settings = self._settings
        scored = (~columns.teacher_log_probs.isnan()).to(columns.loss_mask.dtype)
        student_ids, teacher_ids = columns.student_top_ids, columns.teacher_top_ids
        parts = {
            "student": columns.teacher_on_student_log_probs,
            "teacher": columns.teacher_top_log_probs,
        }
        if columns.candidate_ids is not None:
            ids, valid = _stored(columns)
            log_q = columns.candidate_teacher_log_probs
        elif settings.divergence.strategy == "intersection":
            # The same set from the teacher's side, whose log-probs of it are known.
            ids, valid = candidates(teacher_ids, student.top_k(settings.top_k)[0], "intersection")
            log_q = parts["teacher"]
        else:
            ids, valid = candidates(student_ids, teacher_ids, settings.divergence.strategy)
            wanted = {"only_stu": ["student"], "only_tch": ["teacher"]}.get(
                settings.divergence.strategy, ["student", "teacher"]
            )
            log_q = torch.cat([parts[name] for name in wanted], dim=1)
        known = {}
        if teacher_ids is not None:
            log_q_top = parts["teacher"].to(student.log_p.dtype)
            known["overlap"] = self._overlap(student, teacher_ids, log_q_top)
        # What a failed response has for scores is nobody's business, and NaN times 0 is NaN.
        log_q = torch.where(scored[:, None] > 0, log_q.to(student.log_p.dtype), student.log_probs(ids))
        return self._on_candidates(student, ids, valid, log_q, log_rest(log_q, valid), scored, columns, None, known)

    def _on_candidates(
        self,
        student: Distribution,
        ids: Tensor,
        valid: Tensor,
        log_q: Tensor,
        log_q_rest: Tensor,
        scored: Tensor,
        columns: TokenColumns,
        teacher_log_probs: Tensor | None,
        known: Mapping[str, Tensor | Overlap],
    ) -> SideBySide:
        log_p = student.log_probs(ids).requires_grad_()
        log_p_rest = student.log_rest(ids, valid).requires_grad_()
        old = log_p.detach() if columns.candidate_log_probs is None else columns.candidate_log_probs
        over = Candidates(log_p, log_q, valid, log_p_rest, log_q_rest.to(log_p.dtype), old)
        return SideBySide(over_candidates(over, scored, **known), teacher_log_probs, ids=ids)

    def _overlap(self, student: Distribution, teacher_ids: Tensor | None, log_q: Tensor | None) -> Overlap | None:
        if teacher_ids is None:
            return None
        student_ids, student_log_p = student.top_k(teacher_ids.shape[1])
        shared = overlap(teacher_ids, student_ids)
        return Overlap(shared, student.log_probs(teacher_ids), log_q, student_log_p.exp().sum(dim=1))


@dataclass(frozen=True)
class SideBySide:
    """Both models' terms of a chunk, and how their gradients reach the logits.

    teacher_log_probs: of the sampled tokens, [C], or None where they are a column. slope: of a divergence over the whole
    vocabulary, [C, V/tp]. ids: int [C, K] of the candidates.
    """

    comparison: Comparison
    teacher_log_probs: Tensor | None
    slope: Tensor | None = None
    ids: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """The terms that the loss is differentiated by."""
        if self.slope is not None:
            return [self.comparison.full]
        over = self.comparison.candidates
        return [over.log_p, over.log_p_rest]

    def asked(self, gradients: list[Tensor | None]) -> dict:
        """The leaves' gradients as `Distribution.logit_gradients` takes them."""
        if self.slope is not None:
            return {} if gradients[0] is None else {"of_divergence": (self.slope, gradients[0])}
        over, (of_log_p, of_rest) = self.comparison.candidates, gradients
        asked: dict = {} if of_log_p is None else {"of_log_probs": [(self.ids, of_log_p)]}
        if of_rest is not None:
            asked["of_log_rest"] = (self.ids, over.valid, over.log_p_rest.detach(), of_rest)
        return asked


def _stored(columns: TokenColumns) -> tuple[Tensor, Tensor]:
    """The candidates that were chosen before the rollout's first step: ids, and which are valid (−1 is none)."""
    ids = columns.candidate_ids
    return ids.clamp(min=0), ids >= 0


def _top_k(distribution: Distribution, k: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    return distribution.top_k(k) if k else (None, None)


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    if not loss.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))
