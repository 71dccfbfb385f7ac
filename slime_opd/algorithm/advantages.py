"""Base advantages: an estimator, then whitening.

The OPD penalty is subtracted after whitening, which therefore cannot cancel its coefficient.

Notation: N samples, R response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime_opd.algorithm.estimators import ESTIMATORS
from slime_opd.algorithm.estimators.estimator import EstimatorOptions, Responses
from slime_opd.errors import DataError


def base_advantages(
    responses: Responses, options: EstimatorOptions, *, estimator: str, whiten_advantages: bool, only_penalty: bool
) -> Tensor:
    """The base advantage of each response token, [R] of the mask's dtype.

    Zeros where no sample has a reward (all are NaN), and with `only_penalty`, where the task reward is a metric alone.
    Raises DataError when some samples have a reward and others have none.
    """
    rewards, mask = responses.rewards, responses.mask
    missing = rewards.isnan()
    if only_penalty or bool(missing.all()):
        return torch.zeros_like(mask)
    if bool(missing.any()):
        raise DataError(
            f"{int(missing.sum())} of {len(rewards)} samples have no reward; --custom-rm-path must give every sample one, or none"
        )
    advantages = ESTIMATORS[estimator].advantages(responses, options).to(mask.dtype)
    return whiten(advantages, mask) if whiten_advantages else advantages


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
