"""The table of objectives: which function evaluates which options."""

from __future__ import annotations

from collections.abc import Callable

from slime_opd.objective.options import Options, PolicyOptions, SupervisedOptions
from slime_opd.objective.policy import policy_objective
from slime_opd.objective.streams import Objective
from slime_opd.objective.supervised import supervised_objective
from slime_opd.objective.tokens import Terms, TokenColumns

OBJECTIVES: dict[type, Callable[..., Objective]] = {
    PolicyOptions: policy_objective,
    SupervisedOptions: supervised_objective,
}


def evaluate(columns: TokenColumns, terms: Terms, options: Options) -> Objective:
    """The objective of a chunk, differentiable in the terms."""
    return OBJECTIVES[type(options)](columns, terms, options)
