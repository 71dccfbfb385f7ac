"""The scored columns that `assemble` reads. Pure."""

from __future__ import annotations

from slime_opd.algorithm.estimators import ESTIMATORS
from slime_opd.config import Config
from slime_opd.objective.options import Options, PolicyOptions

# The columns that the importance of a token is made of.
IMPORTANCE = frozenset({"student_entropy", "token_divergence"})


def columns_for_assembly(config: Config, options: Options) -> frozenset[str]:
    """The scored columns that the driver requests from the ranks, for `assemble`."""
    if not isinstance(options, PolicyOptions):
        return frozenset()
    names = set(ESTIMATORS[config.algorithm.advantage_estimator].needs)
    if config.divergence.opd_token_weighting is not None:
        names |= IMPORTANCE
    if options.penalty is not None and not options.penalty_in_step:
        names |= {"log_probs", "penalty_log_probs"}
        names |= {"teacher_log_probs"} if config.teacher.is_in_trainer else set()
    return frozenset(names)
