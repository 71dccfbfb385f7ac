"""Estimators of KL(policy ‖ reference) from sampled tokens. Notation: R response tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_LOW_VARIANCE_BOUND = 10.0


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, *, kind: str) -> Tensor:
    """One number per sampled token whose mean estimates the KL; all [R].

    With d = log π − log π_ref (Schulman 2020, "Approximating KL divergence"): k1 = d, k2 = d²/2,
    k3 = exp(−d) − 1 + d, low_var_kl = k3 clamped to ±10. As values k1 and k3 are unbiased.

    As losses, differentiated through log π at fixed samples, they are other things: k1's expected gradient is 0, k2's
    is that of KL(π ‖ π_ref), and k3's is that of the forward KL(π_ref ‖ π).
    """
    return ESTIMATORS[kind](log_probs - ref_log_probs.detach())


def _k3(difference: Tensor) -> Tensor:
    return (-difference).exp() - 1 + difference


def _low_variance(difference: Tensor) -> Tensor:
    # Beyond 2 × the bound k3 is past it anyhow, and an exponential that overflows has NaN for a gradient.
    return _k3(difference.clamp(min=-2 * _LOW_VARIANCE_BOUND)).clamp(-_LOW_VARIANCE_BOUND, _LOW_VARIANCE_BOUND)


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda difference: difference,
    "k2": lambda difference: difference.square() / 2,
    "k3": _k3,
    "low_var_kl": _low_variance,
}
