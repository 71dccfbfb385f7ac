"""Estimators of KL(policy ‖ reference) from sampled tokens. Notation: R response tokens."""

from __future__ import annotations

from torch import Tensor

_LOW_VARIANCE_BOUND = 10.0


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, *, kind: str) -> Tensor:
    """One number per sampled token whose mean estimates the KL; all [R].

    With d = log π − log π_ref (Schulman 2020, "Approximating KL divergence"): k1 = d, k2 = d²/2,
    k3 = exp(−d) − 1 + d, low_var_kl = k3 clamped to ±10. As values k1 and k3 are unbiased.

    As losses, differentiated through log π at fixed samples, they are other things: k1's expected gradient is 0, k2's
    is that of KL(π ‖ π_ref), and k3's is that of the forward KL(π_ref ‖ π).
    """
    difference = log_probs - ref_log_probs.detach()
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    estimate = (-difference).exp() - 1 + difference
    return estimate if kind == "k3" else estimate.clamp(-_LOW_VARIANCE_BOUND, _LOW_VARIANCE_BOUND)
