"""What the teachers of each --opd-type can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TeacherKind:
    """What a kind of teacher can do; the defaults are those of a run without a teacher.

    scores_rollouts: a server scores each response during the rollout.
    is_in_trainer: the trainer loads the teacher, and scores in its own forward passes.
    has_whole_vocabulary: it gives whole distributions, not only its top-k tokens.
    fixed_temperature: the only temperature at which it scores; None: it scores at any.
    can_generate: it can write responses.
    """

    scores_rollouts: bool = False
    is_in_trainer: bool = False
    has_whole_vocabulary: bool = False
    fixed_temperature: float | None = None
    can_generate: bool = False


NO_TEACHER = TeacherKind()

# By --opd-type. slime_opd/teacher/teacher.py has the table that implements them.
TEACHER_KINDS: Mapping[str, TeacherKind] = {
    # sglang 0.5.9 scores input tokens at temperature 1, whatever temperature a request names.
    "sglang": TeacherKind(scores_rollouts=True, fixed_temperature=1.0, can_generate=True),
    "megatron": TeacherKind(is_in_trainer=True, has_whole_vocabulary=True),
}
