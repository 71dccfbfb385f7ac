"""The objective of supervised fine-tuning."""

from __future__ import annotations

from slime_opd.distill import dynamics
from slime_opd.objective.options import SupervisedOptions
from slime_opd.objective.streams import Objective
from slime_opd.objective.tokens import Terms, TokenColumns


def supervised_objective(columns: TokenColumns, terms: Terms, options: SupervisedOptions) -> Objective:
    """Σ policy_weights · −log π: the negative log-likelihood of the response tokens."""
    means = {
        "train/entropy": dynamics.counted_mean(terms.entropies, columns.loss_mask),
        "train/token_log_probs": dynamics.counted_mean(terms.log_probs, columns.loss_mask),
    }
    stream = Objective(-(columns.policy_weights * terms.log_probs).sum(), means=means)
    return Objective.of_streams([stream])
