"""Denominators. Notation: N samples, R response tokens of one optimizer step, over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(mask: Tensor, response_lengths: Tensor, *, per_token: bool) -> Tensor:
    """Weights w such that a step's loss is Σ_t w_t x_t, over all its micro-batches and ranks.

    mask float [R]; response_lengths int64 [N]. With `per_token` the loss is the mean over unmasked tokens. Otherwise it is
    the mean over samples of each sample's mean over its unmasked tokens; a sample with none is in no denominator.
    Returns float [R]. Because the weights see the whole step, the sum does not change with how it is cut up.
    """
    mask = mask.double()
    if per_token:
        return (mask / mask.sum().clamp(min=1.0)).float()
    sample = torch.repeat_interleave(torch.arange(len(response_lengths)), response_lengths)
    counts = torch.zeros(len(response_lengths), dtype=mask.dtype).index_add_(0, sample, mask)
    trained = (counts > 0).sum().clamp(min=1)
    return (mask / counts.clamp(min=1.0)[sample] / trained).float()
