"""RLOO: each reward relative to the mean of the other samples of its prompt. Notation: N samples, R response tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from slime_opd.algorithm.estimators.estimator import EstimatorOptions, Responses


def advantages(responses: Responses, options: EstimatorOptions) -> Tensor:
    """Each sample's leave-one-out advantage (without normalisation: its reward) at each of its response tokens, [R]."""
    rewards = responses.rewards
    per_sample = leave_one_out(rewards, responses.groups) if options.normalize_rewards else rewards
    return torch.repeat_interleave(per_sample, responses.lengths)


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """r_i − mean of the group's other rewards = n / (n − 1) · (r_i − mean of the group), [N] of the rewards' dtype.

    Ahmadian et al. 2024, arXiv:2402.14740, section 3.2 (after Kool et al. 2019). rewards: float [N]; groups: int64 [N],
    equal for the samples of one prompt. The reward of a group of one has no others to compare with and stays as it is.
    """
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    exact = rewards.double()
    sums = exact.new_zeros(len(counts)).index_add_(0, index, exact)[index]
    others = (counts[index] - 1).clamp(min=1)
    return (exact - (sums - exact) / others).to(rewards.dtype)
