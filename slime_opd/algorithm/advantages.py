"""Base advantages: what a task reward alone says about each token, before any penalty.

Order, stated once: estimator, then whitening (if asked), then, in the training step, the OPD penalty. So whitening cannot
cancel the penalty's coefficient. Notation: N samples, R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slime_opd.errors import DataError


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
    groups int64 [N], equal for the samples of one prompt. Returns [N]. A group of one has no spread to compare with:
    its mean is its reward and its advantage is exactly 0.
    """
    if not subtract_mean:
        return rewards.clone()
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=rewards.dtype).index_add_(0, index, rewards)
    centered = rewards - (sums / counts)[index]
    # One sample's mean is itself; rounding must not make that anything but zero.
    centered = torch.where(counts[index] == 1, 0.0, centered)
    if not divide_by_std:
        return centered
    squares = torch.zeros(len(counts), dtype=rewards.dtype).index_add_(0, index, centered.square())
    std = (squares / (counts - 1).clamp(min=1)).sqrt()
    return centered / (std[index] + epsilon)


ESTIMATORS: dict[str, Callable[..., Tensor]] = {"grpo": group_advantages}


def whiten(values: Tensor, mask: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """Values with mean 0 and variance 1 over unmasked tokens; masked tokens become 0.

    values, mask: [R]. The variance is the unbiased one. Values that are all equal become 0, not NaN.
    """
    chosen = mask > 0
    count = int(chosen.sum())
    if count == 0:
        return torch.zeros_like(values)
    selected = values[chosen]
    mean = selected.mean()
    variance = (selected - mean).square().sum() / max(count - 1, 1)
    return torch.where(chosen, (values - mean) * torch.rsqrt(variance + epsilon), 0.0)


def base_advantages(
    rewards: Tensor,
    groups: Tensor,
    response_lengths: Tensor,
    mask: Tensor,
    *,
    estimator: str,
    normalize_rewards: bool,
    divide_by_std: bool,
    whiten_advantages: bool,
    only_penalty: bool,
) -> Tensor:
    """The base advantage of each response token, [R].

    rewards float [N], NaN where nothing rewards the samples (then for all of them); groups, response_lengths int64 [N];
    mask [R]. `only_penalty` gives zeros: the task reward is for the log alone. Raises DataError when some samples have
    a reward and others have none.
    """
    missing = rewards.isnan()
    if only_penalty or bool(missing.all()):
        return torch.zeros_like(mask)
    if bool(missing.any()):
        raise DataError(
            f"{int(missing.sum())} of {len(rewards)} samples have no reward; a reward function must reward every sample"
        )
    of_sample = ESTIMATORS[estimator](
        rewards, groups, subtract_mean=normalize_rewards, divide_by_std=normalize_rewards and divide_by_std
    )
    advantages = torch.repeat_interleave(of_sample, response_lengths).to(mask.dtype)
    return whiten(advantages, mask) if whiten_advantages else advantages
