"""The inputs of an objective: a chunk's columns of the field table, and the models' terms for its tokens.

Notation: C tokens of the chunk, K ids per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from slime_opd.distill.comparison import Comparison
from slime_opd.distill.dynamics import TokenKinds


@dataclass(frozen=True)
class TokenColumns:
    """The token columns of the field table (slime_opd/fields.py) that objectives read, [C] or [C, K]; None if absent.

    Weights and advantages are there once the rollout is assembled. log_probs: by the policy before the rollout's first
    step; None where a rollout is one step, whose old policy is the present one.
    """

    loss_mask: Tensor
    policy_weights: Tensor | None = None
    advantages: Tensor | None = None
    log_probs: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    teacher_log_probs: Tensor | None = None
    penalty_log_probs: Tensor | None = None
    penalty_return: Tensor | None = None
    penalty_weights: Tensor | None = None
    divergence_base: Tensor | None = None
    divergence_weights: Tensor | None = None
    position_third: Tensor | None = None
    correct: Tensor | None = None
    student_top_ids: Tensor | None = None
    teacher_top_ids: Tensor | None = None
    teacher_top_log_probs: Tensor | None = None
    teacher_on_student_log_probs: Tensor | None = None
    candidate_ids: Tensor | None = None
    candidate_log_probs: Tensor | None = None
    candidate_teacher_log_probs: Tensor | None = None

    @staticmethod
    def from_mapping(columns: Mapping[str, Tensor]) -> TokenColumns:
        """From the columns of a batch, of which those that no objective reads are left out."""
        read = {field.name for field in fields(TokenColumns)}
        return TokenColumns(**{name: values for name, values in columns.items() if name in read})

    @property
    def kinds(self) -> TokenKinds:
        """What the metrics are split by."""
        return TokenKinds(self.position_third, self.correct)

    def rows(self, rows: slice) -> TokenColumns:
        """The tokens `rows`."""
        present = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenColumns(**{name: values[rows] for name, values in present.items() if values is not None})


@dataclass(frozen=True)
class Terms:
    """The models' terms for a chunk's tokens.

    log_probs, entropies: of the present policy, [C], differentiable. penalty_log_probs: the policy's log-probs at the
    teacher's temperature and vocabulary, [C], or None where they are `log_probs`. teacher_log_probs: [C], or None if
    given as a column, or without a teacher. comparison: of the two models' distributions, or None.
    """

    log_probs: Tensor
    entropies: Tensor
    penalty_log_probs: Tensor | None = None
    teacher_log_probs: Tensor | None = None
    comparison: Comparison | None = None
