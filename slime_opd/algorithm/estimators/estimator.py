"""The inputs of an advantage estimator, and its row in the table.

Notation: N samples, R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Responses:
    """The responses of a rollout, those of the student alone.

    rewards: float [N], none missing. groups: int64 [N], equal for the samples of one prompt. lengths: int64 [N], in
    tokens. mask: float [R], 1 where a token trains. scores: the columns that the estimator needs, float [R] each, by
    name.
    """

    rewards: Tensor
    groups: Tensor
    lengths: Tensor
    mask: Tensor
    scores: dict[str, Tensor]


@dataclass(frozen=True)
class EstimatorOptions:
    """normalize_rewards: compare rewards within their group; divide_by_std: by the group's standard deviation, too."""

    normalize_rewards: bool = True
    divide_by_std: bool = True


@dataclass(frozen=True)
class Estimator:
    """`advantages(responses, options)` gives the advantage of each response token, [R].

    needs: columns of the field table, [R] each, that the trainer has to score for it, such as `ref_log_probs`.
    """

    advantages: Callable[[Responses, EstimatorOptions], Tensor]
    needs: frozenset[str] = frozenset()
