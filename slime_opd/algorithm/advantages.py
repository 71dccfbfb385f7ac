"""Base advantages: what a task reward alone says about each token, before any penalty.

Order, stated once: estimator, then whitening (if asked), then, in the training step, the OPD penalty. So whitening cannot
cancel the penalty's coefficient. Statistics are taken in float64: the sum of equal float32 values is exact there, so values
that do not differ give advantages of exactly 0, not of rounding over epsilon.

Notation: N samples, R response tokens.
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
    groups int64 [N], equal for the samples of one prompt. Returns [N] of the rewards' dtype. A group of one has no
    spread to compare with: its mean is its reward and its advantage is exactly 0. Without `subtract_mean` the rewards
    come back as they are.
    """
    if not subtract_mean:
        return rewards.clone()
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    exact = rewards.double()
    centered = exact - (_sums(exact, index, len(counts)) / counts)[index]
    if divide_by_std:
        variance = _sums(centered.square(), index, len(counts)) / (counts - 1).clamp(min=1)
        centered = centered / (variance.sqrt()[index] + epsilon)
    return centered.to(rewards.dtype)


ESTIMATORS: dict[str, Callable[..., Tensor]] = {"grpo": group_advantages}


def broadcast_to_tokens(values: Tensor, response_lengths: Tensor) -> Tensor:
    """Each sample's value at each of its response tokens: [N] and int64 [N] to [R]."""
    return torch.repeat_interleave(values, response_lengths)


def whiten(values: Tensor, mask: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """(v − mean) / sqrt(variance + epsilon) over unmasked tokens, with the unbiased variance; masked tokens become 0.

    values, mask: [R]. Values that do not differ (one token alone, too) become 0, not NaN; so does an all-masked input.
    """
    chosen = mask > 0
    count = int(chosen.sum())
    if count == 0:
        return torch.zeros_like(values)
    centered = values.double() - values[chosen].double().mean()
    variance = centered[chosen].square().sum() / max(count - 1, 1)
    return torch.where(chosen, centered * torch.rsqrt(variance + epsilon), 0.0).to(values.dtype)


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
    """The base advantage of each response token, [R] of the mask's dtype.

    rewards float [N], NaN where nothing rewards the samples (then for all of them, and the advantages are 0); groups,
    response_lengths int64 [N]; mask [R]. `only_penalty` gives zeros: the task reward is for the log alone. Raises
    DataError when some samples have a reward and others have none.
    """
    missing = rewards.isnan()
    if only_penalty or bool(missing.all()):
        return torch.zeros_like(mask)
    if bool(missing.any()):
        raise DataError(
            f"{int(missing.sum())} of {len(rewards)} samples have no reward; --custom-rm-path must give every sample one, or none"
        )
    of_samples = ESTIMATORS[estimator](
        rewards, groups, subtract_mean=normalize_rewards, divide_by_std=normalize_rewards and divide_by_std
    )
    advantages = broadcast_to_tokens(of_samples, response_lengths).to(mask.dtype)
    return whiten(advantages, mask) if whiten_advantages else advantages


def _sums(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Sums of the values of each of `count` groups, [count]."""
    return values.new_zeros(count).index_add_(0, index, values)
