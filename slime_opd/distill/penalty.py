"""The OPD penalty: the sampled-token reverse KL, subtracted from any advantage. Notation: R response tokens."""

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


def apply_penalty(
    advantages: Tensor, student_log_probs: Tensor, teacher_log_probs: Tensor, mask: Tensor, *, coefficient: float
) -> Tensor:
    """A ← A − coefficient · (log p_student − log p_teacher), all [R].

    The penalty is a constant to the optimizer: the gradient flows through the policy ratio alone. It is exactly zero where
    the token is masked, and where the teacher's score is missing (NaN).
    """
    difference = sampled_reverse_kl(student_log_probs, teacher_log_probs)
    counted = (mask > 0) & ~difference.isnan()
    return advantages - coefficient * torch.where(counted, difference, 0.0)
