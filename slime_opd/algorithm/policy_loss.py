"""The policy-gradient loss of each token. Notation: R response tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp() of it is far past any clip, and its products are still finite: a ratio of inf would make NaN of an advantage of
# 0.
_LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyLoss:
    """loss [R], and clipped [R]: 1.0 where the clip took the gradient away."""

    loss: Tensor
    clipped: Tensor


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate: max(−r A, −clip(r, 1 − clip_low, 1 + clip_high) A) with r = exp(log π − log π_old).

    Schulman et al. 2017, arXiv:1707.06347, equation 7, negated to be minimised. `dual_clip` c > 1 bounds it by −c A
    where A < 0 (Ye et al. 2020, arXiv:1912.09729, equation 5). All inputs [R]; only `log_probs` takes a gradient.
    """
    advantages = advantages.detach()
    ratio = (log_probs - old_log_probs.detach()).clamp(max=_LARGEST_LOG_RATIO).exp()
    unclipped = -ratio * advantages
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = torch.maximum(unclipped, bounded)
    clipped = bounded > unclipped
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        beyond = (advantages < 0) & (loss > ceiling)
        loss = torch.where(beyond, ceiling, loss)
        clipped = clipped | beyond
    return PolicyLoss(loss, clipped.to(loss.dtype))
