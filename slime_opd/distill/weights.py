"""Weights of samples, prompts and tokens in the distillation loss. Pure. Notation: N samples, R response tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def reward_weights(correct: Tensor, beta: float) -> Tensor:
    """N · softmax(correct / β), [N]: a right answer has exp(1/β) times the weight of a wrong one.

    correct: 1 where right, 0 where wrong, NaN where nothing rewarded it, which counts as wrong. As `opd.reward_beta` of
    HJSang/OPSD, over all samples of a rollout.
    """
    return len(correct) * torch.softmax(correct.double().nan_to_num(0.0) / beta, dim=0)


def pass_rate_weights(correct: Tensor, groups: Tensor, alpha: float, beta: float) -> Tensor:
    """p^α (1 − p)^β of the pass rate p of each sample's group, [N], with 0^0 = 1.

    PACED, Xu et al. 2026, arXiv:2603.11178: what is always right or always wrong teaches least. correct as in
    `reward_weights`; a NaN is in no pass rate. groups: int64 [N].
    """
    _, index = torch.unique(groups, return_inverse=True)
    known = ~correct.isnan()
    size = int(index.max()) + 1 if len(index) else 0

    def group_sums(values: Tensor) -> Tensor:
        return torch.zeros(size, dtype=torch.float64).index_add_(0, index, values.double())

    rate = (group_sums(torch.where(known, correct, 0.0)) / group_sums(known).clamp(min=1))[index]
    return rate.pow(alpha) * (1 - rate).pow(beta)


def token_importance(entropies: Tensor, divergences: Tensor) -> Tensor:
    """The importance of a token, between 0 and 1, [R]: high student entropy, or low entropy and high divergence.

    The two regions are TIP's (Xu et al. 2026, arXiv:2604.14084). Their combination here is ours: with h = 1 − exp(−H)
    and d = 1 − exp(−D), the score is h or d, 1 − (1 − h)(1 − d) = 1 − exp(−(H + D)). entropies, divergences: [R], in
    nats.
    """
    return -torch.expm1(-(entropies + divergences))


def keep_top(scores: Tensor, counted: Tensor, fraction: float) -> Tensor:
    """1 for the share `fraction` of counted tokens with the highest scores, rounded up, else 0: [R].

    counted: bool [R]. Equal scores are taken in order, so that the number is exact: at least one, where any is counted.
    """
    keep_mask = torch.zeros_like(scores)
    total = int(counted.sum())
    # A fraction such as 0.1 is a little more than itself, and must not round up to one more token for it.
    count = min(total, max(1, math.ceil(fraction * total - 1e-9)))
    order = torch.argsort(scores.masked_fill(~counted, -torch.inf), descending=True, stable=True)
    keep_mask[order[:count]] = 1.0
    return keep_mask


def normalized(weights: Tensor, base: Tensor) -> Tensor:
    """Weights [R] scaled so that Σ base · weights is 1, float32; all 0 where that sum is 0.

    base: [R], the tokens' weights in the loss without them. So the weights move the loss between tokens and keep the
    size of the step.
    """
    total = (weights.double() * base.double()).sum()
    return (weights.double() / total if total > 0 else torch.zeros_like(weights)).float()


@dataclass(frozen=True)
class WeightStatistics:
    """Over tokens whose base weight is above 0. effective_share: 1 where all weights are equal, 1/n where one of n
    tokens has all the weight.
    """

    minimum: float
    maximum: float
    effective_share: float


def statistics(weights: Tensor, base: Tensor) -> WeightStatistics:
    """Of weights [R] relative to base [R].

    The share is (Σ b w)² / (Σ b · Σ b w²): Kish's effective sample size over the size.
    """
    chosen = base > 0
    if not bool(chosen.any()):
        return WeightStatistics(math.nan, math.nan, math.nan)
    weights, base = weights[chosen].double(), base[chosen].double()
    square = base.sum() * (base * weights.square()).sum()
    share = float((base * weights).sum().square() / square) if square > 0 else 0.0
    return WeightStatistics(float(weights.min()), float(weights.max()), share)
