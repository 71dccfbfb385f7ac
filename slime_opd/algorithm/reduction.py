"""Denominators. Notation: N samples, R response tokens of one optimizer step, over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(mask: Tensor, response_lengths: Tensor, *, per_token: bool) -> Tensor:
    """Weights w such that a step's loss is Σ_t w_t x_t, over all its micro-batches and ranks.

    mask float [R]; response_lengths int64 [N]. With `per_token` the loss is the mean over unmasked tokens. Otherwise it
    is the mean over samples of each sample's mean over its unmasked tokens; a sample with none is in no denominator
    (slime divides by the global batch size, so there it makes the others count less). Returns float32 [R], which add up
    to 1, or to 0 where all is masked. Because the weights see the whole step, the sum does not change with how the step
    is split.
    """
    mask = mask.double()
    if per_token:
        return (mask / _avoid_zero(mask.sum())).float()
    samples = torch.arange(len(response_lengths), device=mask.device)
    sample = torch.repeat_interleave(samples, response_lengths)
    counts = mask.new_zeros(len(response_lengths)).index_add_(0, sample, mask)
    return (mask / _avoid_zero(counts)[sample] / _avoid_zero((counts > 0).sum())).float()


def _avoid_zero(counts: Tensor) -> Tensor:
    """Replace zero counts by one."""
    return counts.masked_fill(counts == 0, 1)
