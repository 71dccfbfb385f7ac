"""Which columns forward passes have to score before the first optimizer step of a rollout, and who reads them. Pure."""

from __future__ import annotations

from slime_opd.algorithm.estimators import ESTIMATORS
from slime_opd.config import Config

# What the importance of a token is made of.
IMPORTANCE = frozenset({"student_entropy", "token_divergence"})


def has_several_steps(config: Config) -> bool:
    """Whether the policy that a step starts from may differ from the one that generated, and needs a pass of its own.

    With one step per rollout the old policy is the present one: the step's own forward gives its log-probs.
    """
    return config.steps_per_rollout > 1


def columns_for_assembly(config: Config) -> frozenset[str]:
    """The scored columns that `assemble` reads, so that the driver asks the ranks for them."""
    if config.is_sft:
        return frozenset()
    names = set(ESTIMATORS[config.algorithm.advantage_estimator].needs)
    if config.divergence.opd_token_weighting is not None:
        names |= IMPORTANCE
    if config.penalty_coefficient and has_several_steps(config) and not config.opd.opd_refresh_student:
        names |= {"log_probs", "penalty_log_probs"}
        names |= {"teacher_log_probs"} if config.teacher.is_in_trainer else set()
    return frozenset(names)
