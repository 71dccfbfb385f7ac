"""The OPD penalty: the sampled-token reverse KL, subtracted from any advantage. Pure.

Notation: N samples, R response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sampled_reverse_kl(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """log p_student(a_t) − log p_teacher(a_t) at the sampled tokens, [R], detached.

    For tokens drawn from the student its mean is KL(student ‖ teacher), the reverse KL (Agarwal et al. 2024,
    arXiv:2306.13649, section 3; as a per-token reward: Thinking Machines Lab 2025, "On-Policy Distillation").
    NaN where the teacher's score is missing.
    """
    return student_log_probs.detach() - teacher_log_probs.detach()


def clamp_signal(signal: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    """The signal [R] held between −limit and limit, and 1 where that changed it, [R]; NaN stays NaN. None is no limit."""
    if limit is None:
        return signal, torch.zeros_like(signal)
    clamped = (signal.abs() > limit).to(signal.dtype)
    return signal.clamp(-limit, limit), torch.where(signal.isnan(), signal, clamped)


def discounted_sums(signal: Tensor, lengths: Tensor, discount: float) -> Tensor:
    """y_t = s_t + discount · y_{t+1} inside each sample, [R]: what a token and the ones after it add up to.

    signal: [R]; lengths: int64 [N]. A NaN counts as 0 for the tokens before it, and is NaN itself. Sums of 2^i tokens are
    made of two of 2^(i−1), so it takes log2 of the longest response steps.
    """
    ends = torch.repeat_interleave(lengths.cumsum(0), lengths)
    place = torch.arange(len(signal), device=signal.device)
    sums, span, longest = signal.nan_to_num(nan=0.0), 1, int(lengths.max()) if len(lengths) else 0
    while span < longest:
        later = torch.where(place + span < ends, sums[(place + span).clamp(max=len(signal) - 1)], 0.0)
        sums = sums + discount**span * later
        span *= 2
    return torch.where(signal.isnan(), signal, sums)


def apply_penalty(
    advantages: Tensor, signal: Tensor, mask: Tensor, *, coefficient: float, weights: Tensor | None = None
) -> Tensor:
    """A ← A − coefficient · weights · signal, all [R]; weights None is 1 for every token.

    The penalty is a constant to the optimizer: the gradient flows through the policy ratio alone. It is exactly zero where
    the token is masked, and where the signal is missing (NaN).
    """
    signal = signal.detach() if weights is None else signal.detach() * weights
    counted = (mask > 0) & ~signal.isnan()
    return advantages - coefficient * torch.where(counted, signal, 0.0)
