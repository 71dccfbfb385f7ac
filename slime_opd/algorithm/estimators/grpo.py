"""GRPO: rewards relative to those of the same prompt's other samples.

Statistics are taken in float64: the sum of equal float32 values is exact there, so rewards that do not differ give
advantages of exactly 0, not of rounding over epsilon. Notation: N samples, R response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime_opd.algorithm.estimators.estimator import EstimatorOptions, Responses


def advantages(responses: Responses, options: EstimatorOptions) -> Tensor:
    """Each sample's group advantage at each of its response tokens, [R]."""
    per_sample = group_advantages(
        responses.rewards,
        responses.groups,
        subtract_mean=options.normalize_rewards,
        divide_by_std=options.normalize_rewards and options.divide_by_std,
    )
    return torch.repeat_interleave(per_sample, responses.lengths)


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    subtract_mean: bool = True,
    divide_by_std: bool = True,
    epsilon: float = 1e-6,
) -> Tensor:
    """Rewards relative to their group: (r − mean) / (std + epsilon), with the unbiased std.

    GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.2 (there with outcome supervision). rewards float [N];
    groups int64 [N], equal for the samples of one prompt. Returns [N] of the rewards' dtype. A group of one has no
    spread to compare with: its mean is its reward and its advantage is exactly 0. Without `subtract_mean` the rewards
    are returned unchanged.
    """
    if not subtract_mean:
        return rewards.clone()
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    exact = rewards.double()
    centered = exact - (_group_sums(exact, index, len(counts)) / counts)[index]
    if divide_by_std:
        variance = _group_sums(centered.square(), index, len(counts)) / (counts - 1).clamp(min=1)
        centered = centered / (variance.sqrt()[index] + epsilon)
    return centered.to(rewards.dtype)


def _group_sums(values: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """The sum of each group's values, [num_groups]."""
    return values.new_zeros(num_groups).index_add_(0, index, values)
