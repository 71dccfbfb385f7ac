"""The OPD penalty: the sampled-token reverse KL, subtracted from any advantage. Pure.

Notation: N samples, R response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PenaltyOptions:
    """The penalty's coefficient, the clamp and the discount of its signal, and whose log-probs are the student's.

    clamp: in nats, None for none. discount: 0 penalises each token by its own signal, above 0 by the discounted
    return-to-go. refresh_student: each optimizer step uses the policy it starts from, not the policy that starts the
    rollout's first step.
    """

    coefficient: float
    clamp: float | None = None
    discount: float = 0.0
    refresh_student: bool = False


def sampled_reverse_kl(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """log p_student(a_t) − log p_teacher(a_t) at the sampled tokens, [R], detached.

    For tokens drawn from the student its mean is KL(student ‖ teacher), the reverse KL (Agarwal et al. 2024,
    arXiv:2306.13649, section 3; as a per-token reward: Thinking Machines Lab 2025, "On-Policy Distillation").
    NaN where the teacher's score is missing.
    """
    return student_log_probs.detach() - teacher_log_probs.detach()


def clamp_signal(signal: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    """The signal [R] clamped to ±limit, and an indicator of the clamped tokens [R]; NaN stays NaN. None is no limit."""
    if limit is None:
        return signal, torch.zeros_like(signal)
    clamped = (signal.abs() > limit).to(signal.dtype)
    return signal.clamp(-limit, limit), torch.where(signal.isnan(), signal, clamped)


def discounted_return_to_go(signal: Tensor, lengths: Tensor, discount: float) -> Tensor:
    """y_t = s_t + discount · y_{t+1} within each response, [R].

    signal: [R]; lengths: int64 [N]. A NaN counts as 0 for the tokens before it, and is NaN itself. Sums of 2^i tokens
    are made of two of 2^(i−1), so it takes log2 of the longest response steps.
    """
    ends = torch.repeat_interleave(lengths.cumsum(0), lengths)
    index = torch.arange(len(signal), device=signal.device)
    sums, span, longest = signal.nan_to_num(nan=0.0), 1, int(lengths.max()) if len(lengths) else 0
    while span < longest:
        later = torch.where(index + span < ends, sums[(index + span).clamp(max=len(signal) - 1)], 0.0)
        sums = sums + discount**span * later
        span *= 2
    return torch.where(signal.isnan(), signal, sums)


def penalty_return(
    student_log_probs: Tensor, teacher_log_probs: Tensor, mask: Tensor, lengths: Tensor, options: PenaltyOptions
) -> Tensor:
    """The discounted return-to-go of the clamped signal, over unmasked tokens, [R]. All [R], lengths int64 [N]."""
    signal, _ = clamp_signal(sampled_reverse_kl(student_log_probs, teacher_log_probs), options.clamp)
    return discounted_return_to_go(signal * (mask > 0), lengths, options.discount)


def subtract_penalty(
    advantages: Tensor, signal: Tensor, mask: Tensor, *, coefficient: float, weights: Tensor | None = None
) -> Tensor:
    """A ← A − coefficient · weights · signal, all [R]; weights None is 1 for every token.

    The penalty is a constant to the optimizer: the gradient flows through the policy ratio alone. It is exactly zero
    where the token is masked, and where the signal is missing (NaN).
    """
    signal = signal.detach() if weights is None else signal.detach() * weights
    counted = (mask > 0) & ~signal.isnan()
    return advantages - coefficient * torch.where(counted, signal, 0.0)
