"""Terms of whole responses, which are made before the head's chunks cut them. Pure.

Notation: N samples and R response tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from slime_opd.distill.penalty import penalty_return
from slime_opd.objective.options import PolicyOptions
from slime_opd.objective.tokens import TokenColumns


def needs_whole_responses(options: PolicyOptions) -> bool:
    """Whether a step's objective has a term that reads whole responses."""
    return options.penalty is not None and options.penalty_in_step and options.penalty.discount > 0


def response_columns(
    columns: TokenColumns, log_probs: Tensor, response_lengths: Tensor, options: PolicyOptions
) -> TokenColumns:
    """The columns with those that need whole responses: `penalty_return`, of the discounted penalty.

    log_probs: the present policy's at the teacher's temperature, [R], without a gradient. response_lengths: int64 [N].
    """
    signal = penalty_return(
        log_probs, columns.teacher_log_probs, columns.policy_weights, response_lengths, options.penalty
    )
    return replace(columns, penalty_return=signal)
